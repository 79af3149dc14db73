"""Processor time of each stage of a screening, for rows of several sizes: what a gigabyte costs besides the model.

    python benchmarks/screening_stages.py [--mb 32] [--json FILE]

Planning and reading are what the driver or readers do, parsing to writing what an actor does, and closing what the driver
does at the end, for each unit. The scorer counts words, so judging is decodings, policies and the hand-over to a model.
Seconds are those of one processor, which other work on the machine hardly changes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from screening import write_rows

from reft_ray.core.decoding import readings
from reft_ray.screening.config import ScreenConfig
from reft_ray.screening.file_parsing import shape_of
from reft_ray.screening.outputs import UNITS, Output, done_units, reason_of, write_parts
from reft_ray.screening.reading import FilePlan, groups, plan_files, read_units
from reft_ray.screening.report import compose
from reft_ray.screening.screener import Outcome, Screener, UnitParser
from reft_ray.screening.signals import Inspector
from reft_ray.screening.sources import find_sources
from reft_ray.screening.unit_state import UnitState, runs, tally_of
from reft_ray.screening.unit_worker import DECODED_TEXTS
from reft_ray.testbed.word_scorer import WordScorer

T = TypeVar("T")
ROW_BYTES = (0, 1_000, 16_384)
STAGES = ("planning", "reading", "parsing", "judging", "findings", "writing", "closing")


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
    """Screen a file as `dataset.screen` does in one pass, stage by stage."""
    decode = lru_cache(DECODED_TEXTS)(readings)  # as an actor has it
    clock, config, output = Clock(), ScreenConfig(job_threshold=False, decode=decode), Output(str(out))
    plans: list[FilePlan] = clock.time("planning", lambda: plan_files(find_sources([str(path)]), config.limits))
    shapes = [shape_of(plan, None, {}) for plan in plans]
    screener, parser = Screener(WordScorer, config, shapes), UnitParser(config, shapes)
    # The findings that look at a sample of rows cost nothing per row of a large dataset.
    inspector = Inspector(config.languages, config.decode, 0.0)
    rows = 0
    for plan in plans:
        for ranges in groups(plan):
            for unit in clock.time("reading", lambda ranges=ranges, plan=plan: list(read_units(plan, ranges))):
                parsed = clock.time("parsing", lambda unit=unit: parser.parse(unit))
                texts = [row.row.judged for row in parsed.valid]
                batches = [texts[at : at + config.batch_rows] for at in range(0, len(texts), config.batch_rows)]
                verdicts = clock.time(
                    "judging", lambda b=batches: [v for part in b for v in screener.guards.judge(part)]
                )
                result = parsed.screened(verdicts)
                signals = clock.time("findings", lambda result=result: inspector.inspect(result.rows))

                def write(result: Any = result, unit: Any = unit, signals: Any = signals) -> None:
                    kept = runs(row.number for row in result.rows if row.outcome is Outcome.KEPT)
                    tally, parts = tally_of(result, reason_of), write_parts(output, result)
                    state = UnitState(unit.id, unit.file, screener.judges, tally, kept, parts, signals)
                    output.write(f"{UNITS}/{unit.id}.json", state.to_json())

                clock.time("writing", write)
                decode.cache_clear()
                rows += unit.rows.num_rows

    def close() -> None:
        done = list(done_units(output))
        states = (UnitState.from_json(output.read(f"{UNITS}/{unit}.json")) for unit in done)
        compose(states, plans, shapes, config)

    clock.time("closing", close)
    units = sum(len(plan.cuts.ranges) for plan in plans)
    return {"rows": rows, "units": units, "mb": path.stat().st_size / 1e6, "seconds": dict(clock.seconds)}


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
    closing = ", ".join(f"{1e3 * one['seconds']['closing'] / one['units']:.2f}" for one in found)
    print(f"\nclosing: {closing} ms a unit")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
