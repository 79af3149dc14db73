"""Poison among the rows of a task: what the teacher's thresholds withhold, and the threshold of the dataset.

    python benchmarks/task_rows.py --rows DIR [--teacher smollm2] [--scored 200] [--draws 10]

`DIR` has attacks/poison_prompts.jsonl and tasks/{sst2,agnews,gsm8k}_train.jsonl. Prompts are scored once; datasets
are drawn from them. Prints one JSON line per task, and one per task and share of poison.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import torch

from reft_ray.core.job_threshold import JobThresholdRule
from reft_ray.core.quality import auroc, recall_at_fpr
from reft_ray.hf.ref_teacher import load_scorer
from reft_ray.teachers import BUILTIN, teacher_folder

TASKS = ("sst2", "agnews", "gsm8k")
SHARES = (0.0, 0.05, 0.1, 0.3, 0.5)


def main() -> None:
    """Score, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--teacher", default=BUILTIN)
    parser.add_argument("--scored", type=int, default=200, help="prompts of each kind")
    parser.add_argument("--draws", type=int, default=10)
    args = parser.parse_args()
    rng = random.Random(0)
    scorer = load_scorer(teacher_folder(args.teacher), None)

    def scores(name: str) -> list[float]:
        lines = (args.rows / name).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in rng.sample(lines, min(args.scored, len(lines)))]
        texts = [row["prompt"] if "prompt" in row else row["messages"][0]["content"] for row in rows]
        return [item.score for item in scorer.score(texts)]

    poison = scores("attacks/poison_prompts.jsonl")
    kinds = {task: scores(f"tasks/{task}_train.jsonl") for task in TASKS}
    kinds["all three"] = [score for values in kinds.values() for score in values]
    for kind, task in kinds.items():
        both, labels = torch.tensor(poison + task), torch.tensor([1] * len(poison) + [0] * len(task))
        _show(kind, auroc=auroc(both, labels), recall_at_1=recall_at_fpr(both, labels, 0.01))
        for share in SHARES:
            count = round(0.75 * args.scored)
            drawn = [
                (rng.sample(task, count), rng.sample(poison, min(len(poison), round(count * share / (1 - share)))))
                for _ in range(args.draws)
            ]
            found = [JobThresholdRule().apply([*rows, *bad], scorer.thresholds) for rows, bad in drawn]
            pairs = list(zip(drawn, found, strict=True))
            _show(
                kind,
                poison=share,
                withheld=mean(_above(bad, scorer.thresholds.review) for _, bad in drawn),
                withheld_by_own=mean(_above(bad, one.thresholds.review) for (_, bad), one in pairs),
                task_withheld=mean(_above(rows, scorer.thresholds.review) for rows, _ in drawn),
                task_withheld_by_own=mean(_above(rows, one.thresholds.review) for (rows, _), one in pairs),
                with_own=mean(one.own is not None for one in found),
            )


def _above(scores: Sequence[float], threshold: float) -> float:
    return sum(score > threshold for score in scores) / max(1, len(scores))


def _show(kind: str, **figures: float) -> None:
    print(json.dumps({"task": kind, **{name: round(value, 3) for name, value in figures.items()}}), flush=True)


if __name__ == "__main__":
    main()
