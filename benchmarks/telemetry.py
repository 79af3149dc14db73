"""Cost of telemetry in the filter, as a share of the time for judging a row.

    python benchmarks/telemetry.py [--quick] [--json FILE] [--model PATH]

Judges batches of 32 rows with and without recording, in turns, and measures recording separately. The word scorer is
the worst case, because it costs almost nothing; the teacher is a small random Llama truncated at half depth, or the model
of --model.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from reft_ray.core.conversation import Conversation, chat
from reft_ray.core.scoring import Scorer, judge
from reft_ray.core.verdict import Calibration, Thresholds, Verdict
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.loading import load_base
from reft_ray.hf.scorer import TeacherScorer
from reft_ray.hf.tiny import TinyShape, tiny_llama, train_tokenizer
from reft_ray.telemetry import catalog
from reft_ray.telemetry.ray_recorder import RayRecorder
from reft_ray.telemetry.recorder import NullRecorder, PrometheusRecorder, Recorder
from reft_ray.telemetry.verdict_metrics import record_verdicts
from reft_ray.testbed.word_scorer import WordScorer

BATCH = 32
WORDS = tuple("abcdefghijklmnopqrstuvwxyz"[n : n + 5] for n in range(20))


def rows(count: int, seed: int = 0) -> list[Conversation]:
    """Random prompts of 8 to 40 words."""
    rng = random.Random(seed)
    return [chat(" ".join(rng.choices(WORDS, k=rng.randint(8, 40)))) for _ in range(count)]


def teacher(model: str | None) -> TeacherScorer:
    """A scorer that runs a real forward pass."""
    network: PreTrainedModel
    if model is None:
        tokenizer = train_tokenizer([" ".join(WORDS)] * 100, vocab_size=512)
        network, chat_format, layers = tiny_llama(tokenizer, TinyShape(), seed=0), ChatFormat(tokenizer), 6
    else:
        base = load_base(model)
        network, chat_format, layers = base.model, ChatFormat(base.tokenizer), base.layers
    refusal = torch.nn.functional.normalize(torch.ones(network.config.hidden_size), dim=0)
    thresholds, calibration = Thresholds(0.2, 0.5), Calibration(6.0, 0.0)
    return TeacherScorer(network, chat_format, refusal, layers // 2, "rt-benchmark", thresholds, calibration)


def record(recorder: Recorder, verdicts: Sequence[Verdict], seconds: float) -> None:
    """Everything that the service records for one batch."""
    record_verdicts(
        recorder,
        [verdict.decision for verdict in verdicts],
        ["clear" if verdict.decision == "allow" else "refusal_score" for verdict in verdicts],
        [verdict.score for verdict in verdicts],
        stream="screening",
        policy="online",
        teacher="rt-benchmark",
    )
    recorder.set(catalog.FILTER_QUEUE_DEPTH, 0)
    for metric in (catalog.FILTER_QUEUE_SECONDS, catalog.FILTER_TOKENISE_SECONDS, catalog.FILTER_FORWARD_SECONDS):
        recorder.observe(metric, seconds)
    recorder.observe(catalog.FILTER_BATCH_ROWS, len(verdicts))
    recorder.observe(catalog.FILTER_BATCH_TOKENS, 20 * len(verdicts))
    for content in ("text", "padding"):
        recorder.count(catalog.FILTER_TOKENS, 10 * len(verdicts), content=content)
    for result in ("hit", "miss"):
        recorder.count(catalog.FILTER_CACHE, len(verdicts) / 2, result=result)
    recorder.observe(catalog.FILTER_REQUEST_SECONDS, seconds, stream="screening")


def measure(scorer: Scorer, recorder: Recorder, count: int, rounds: int) -> dict[str, float]:
    """Judging, judging with recording, and recording, in turns on every batch; medians over rounds."""
    sample = rows(count)
    batches = [sample[start : start + BATCH] for start in range(0, count, BATCH)]
    kept = judge(scorer, batches[0])

    def plain(batch: list[Conversation]) -> None:
        judge(scorer, batch)

    def recorded(batch: list[Conversation]) -> None:
        started = time.perf_counter()
        verdicts = judge(scorer, batch)
        record(recorder, verdicts, time.perf_counter() - started)

    def recording(batch: list[Conversation]) -> None:
        record(recorder, kept, 0.001)

    works: tuple[Callable[[list[Conversation]], None], ...] = (plain, recorded, recording)
    times = []
    for _ in range(rounds):
        sums = [0.0, 0.0, 0.0]
        for batch in batches:
            for index, work in enumerate(works):
                started = time.perf_counter()
                work(batch)
                sums[index] += time.perf_counter() - started
        times.append(sums)
    judging, alone = (statistics.median(sums[index] for sums in times) / count for index in (0, 2))
    return {
        "judge_us_per_row": judging * 1e6,
        "record_us_per_row": alone * 1e6,
        "record_share": alone / judging,
        "rows_per_second_lost": 1 - statistics.median(one / two for one, two, _ in times),
    }


def main() -> None:
    """Print the table, and write it as JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rows and rounds")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--model", help="a local base model instead of the small random one")
    args = parser.parse_args()
    count, rounds = (640, 5) if args.quick else (3200, 9)

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import ray

    ray.init(num_cpus=1, include_dashboard=False, logging_level=logging.ERROR)
    ray_recorder = RayRecorder()
    recorders: dict[str, Recorder] = {"null": NullRecorder(), "prometheus": PrometheusRecorder(), "ray": ray_recorder}
    scorers: dict[str, Scorer] = {"words": WordScorer(), "teacher": teacher(args.model)}
    figures = {
        scorer_name: {name: measure(scorer, recorder, count, rounds) for name, recorder in recorders.items()}
        for scorer_name, scorer in scorers.items()
    }
    ray_recorder.close()
    ray.shutdown()

    print(f"{'scorer':8} {'recorder':11} {'judge us/row':>12} {'record us/row':>13} {'share':>7} {'rows/s lost':>11}")
    for scorer_name, by_recorder in figures.items():
        for name, figure in by_recorder.items():
            print(
                f"{scorer_name:8} {name:11} {figure['judge_us_per_row']:12.1f} {figure['record_us_per_row']:13.2f}"
                f" {figure['record_share']:7.2%} {figure['rows_per_second_lost']:11.2%}"
            )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
