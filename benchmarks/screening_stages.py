"""Processor time of each stage of a screening, for rows of several sizes: what a gigabyte costs besides the model.

    python benchmarks/screening_stages.py [--mb 32] [--json FILE]

Planning and reading are what tasks do, parsing to writing what actors do, and the threshold of the dataset and closing what
the driver does for each unit; reading and parsing happen in both passes. The scorer counts words, so judging is decodings,
policies and the hand-over to a model. Seconds are those of one processor, which other work on the machine hardly changes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from screening import write_rows

from reft_ray.core.decoding import readings
from reft_ray.screening.config import ScreenConfig
from reft_ray.screening.dataset_threshold import derive
from reft_ray.screening.file_parsing import shape_of
from reft_ray.screening.outputs import UNITS, Output, done_units
from reft_ray.screening.reading import FilePlan, groups, plan_files, read_units
from reft_ray.screening.report import compose
from reft_ray.screening.screener import ParsedUnit, Screener, UnitParser
from reft_ray.screening.signals import Inspector
from reft_ray.screening.sources import find_sources
from reft_ray.screening.stored_verdicts import JudgedUnit, judged_units, read_judged, stored_scores, write_judged
from reft_ray.screening.unit_state import UnitState
from reft_ray.screening.unit_worker import DECODED_TEXTS, finish
from reft_ray.testbed.word_scorer import WordScorer

T = TypeVar("T")
ROW_BYTES = (0, 1_000, 16_384)
SAMPLE = 0.0
"""What looks at a sample of rows costs nothing per row of a large dataset."""
DRIVER = ("threshold", "closing")
STAGES = ("planning", "reading", "parsing", "judging", "findings", "storing", "writing", *DRIVER)


class Clock:
    """Seconds of the processor by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def time(self, stage: str, work: Callable[[], T]) -> T:
        """Do the work and count its time."""
        started = time.process_time()
        done = work()
        self.seconds[stage] += time.process_time() - started
        return done


def measure(path: Path, out: Path) -> dict[str, Any]:
    """Screen a file as `dataset.screen` does, in two passes, stage by stage."""
    decode = lru_cache(DECODED_TEXTS)(readings)  # as an actor has it
    clock, config, output = Clock(), ScreenConfig(decode=decode), Output(str(out))
    plans: list[FilePlan] = clock.time("planning", lambda: plan_files(find_sources([str(path)]), config.limits))
    shapes = [shape_of(plan, None, {}) for plan in plans]
    screener, parser = Screener(WordScorer, config, shapes), UnitParser(config, shapes)
    inspector = Inspector(config.languages, config.decode, SAMPLE)

    def units() -> Iterator[ParsedUnit]:
        for plan in plans:
            for ranges in groups(plan):
                for unit in clock.time("reading", lambda ranges=ranges, plan=plan: list(read_units(plan, ranges))):
                    yield clock.time("parsing", lambda unit=unit: parser.parse(unit))

    for parsed in units():
        texts = [row.row.judged for row in parsed.valid]
        batches = [texts[at : at + config.batch_rows] for at in range(0, len(texts), config.batch_rows)]
        verdicts = clock.time("judging", lambda b=batches: [v for part in b for v in screener.guards.judge(part)])
        result = parsed.screened(verdicts)
        signals = clock.time("findings", lambda result=result: inspector.inspect(result.rows))
        judged = JudgedUnit.of(result, screener.judges, signals)
        clock.time("storing", lambda judged=judged: write_judged(output, judged, SAMPLE))
        decode.cache_clear()

    known = list(judged_units(output))
    threshold = clock.time("threshold", lambda: derive(stored_scores(output, known), config))
    rows = 0
    for parsed in units():

        def write(parsed: ParsedUnit = parsed) -> None:
            judged = read_judged(output, parsed.unit.id)
            finish(output, parsed.screened([threshold.apply(verdict) for verdict in judged.verdicts]), judged)

        clock.time("writing", write)
        rows += len(parsed.rows)

    def close() -> None:
        states = (UnitState.from_json(output.read(f"{UNITS}/{unit}.json")) for unit in done_units(output))
        compose(states, plans, shapes, config)

    clock.time("closing", close)
    return {"rows": rows, "units": len(known), "mb": path.stat().st_size / 1e6, "seconds": dict(clock.seconds)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=32, help="size of each file")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    found = []
    for row_bytes in ROW_BYTES:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.jsonl"
            write_rows(path, options.mb * 1_000_000 // max(row_bytes, 250), row_bytes)
            found.append(measure(path, Path(folder) / "out"))
    sizes = [f"{one['mb'] * 1e6 / one['rows']:,.0f} bytes" for one in found]
    print(f"| microseconds a row (MB/s) | {' | '.join(sizes)} |")
    print(f"|---{'|---' * len(found)}|")
    for stage in STAGES:
        cells = [f"{1e6 * s / one['rows']:.1f} ({one['mb'] / s:,.0f})" for one in found if (s := one["seconds"][stage])]
        print(f"| {stage} | {' | '.join(cells)} |")
    totals = [sum(one["seconds"].values()) for one in found]
    cells = [f"{1e6 * s / one['rows']:.1f} ({one['mb'] / s:,.1f})" for s, one in zip(totals, found, strict=True)]
    print(f"| together | {' | '.join(cells)} |")
    for stage in DRIVER:
        cells = [f"{1e3 * one['seconds'][stage] / one['units']:.2f}" for one in found]
        print(f"\n{stage}: {', '.join(cells)} ms a unit")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
