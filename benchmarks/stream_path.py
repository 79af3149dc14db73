"""Cost of a streamed row without the model, by step, in microseconds of processor time.

    python benchmarks/stream_path.py [--rows 2048] [--json FILE]

Processor time, the best of five, so that other work on the machine has little effect.
"""

from __future__ import annotations

import argparse
import json
import pickle
import time
from collections.abc import Callable
from pathlib import Path

from random_teacher import prompts

from reft_ray.api.context import FilterContext
from reft_ray.api.moderations import evidence
from reft_ray.api.moderator import LocalModerator, ModerationBatch
from reft_ray.api.rows import parse_row
from reft_ray.api.settings import FilterSettings
from reft_ray.api.verdict_stream import ndjson
from reft_ray.core.decoding import readings
from reft_ray.core.scoring import judge
from reft_ray.telemetry.recorder import PrometheusRecorder
from reft_ray.testbed.word_scorer import WordScorer

REPEATS = 5


def costs(rows: int) -> dict[str, float]:
    """Microseconds per row of each step: at the gateway, in transport, at the teacher."""
    texts = prompts(rows, seed=1)
    lines = [json.dumps({"messages": [{"role": "user", "content": text}]}).encode() for text in texts]
    parsed = [parse_row(number, line) for number, line in enumerate(lines)]
    conversations = tuple(row.conversation for row in parsed if row.conversation is not None)
    judgement = ModerationBatch("rt-words", judge(WordScorer(), conversations))
    records = [{"type": "verdict", "row": row.number, "id": row.id} for row in parsed]
    guard = FilterContext(LocalModerator(WordScorer()), FilterSettings(), PrometheusRecorder())

    def write() -> bytes:
        return ndjson(record | evidence(v) for record, v in zip(records, judgement.verdicts, strict=True))

    steps: dict[str, Callable[[], object]] = {
        "gateway: parse": lambda: [parse_row(number, line) for number, line in enumerate(lines)],
        "gateway: count": lambda: guard.record(judgement, "screening"),
        "gateway: write": write,
        "both: rows as bytes and back": lambda: pickle.loads(pickle.dumps(conversations)),
        "both: verdicts as bytes and back": lambda: pickle.loads(pickle.dumps(judgement)),
        "teacher: decode": lambda: [readings(text) for text in texts],
        "teacher: decode, gather and decide": lambda: judge(WordScorer(), conversations),
    }
    return {name: round(1e6 * _processor_seconds(step) / rows, 1) for name, step in steps.items()}


def _processor_seconds(step: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(REPEATS):
        started = time.process_time()
        step()
        best = min(best, time.process_time() - started)
    return best


def main() -> None:
    """Measure, print, and write JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048, help="rows of the stream")
    parser.add_argument("--json", type=Path, help="write the report to this file")
    options = parser.parse_args()
    report = costs(options.rows)
    print(json.dumps(report, indent=2))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
