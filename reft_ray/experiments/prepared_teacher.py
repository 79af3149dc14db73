"""The Ref-Teacher that the package carries for SmolLM2, made by one command:

    python -m reft_ray.experiments.prepared_teacher --rows DIR --out reft_ray/teachers/smollm2

Only rows under permissive licences are used, and no outputs of other models. Refusals and part of the helpful answers
are the project's own sentences (`reft_ray.testbed`).
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from reft_ray.core.conversation import Example, Label, chat
from reft_ray.finetuning.config import Resources, TeacherConfig
from reft_ray.finetuning.prompts import hold_out_sources
from reft_ray.finetuning.teacher_loop import TeacherData
from reft_ray.finetuning.trainer import prepare_teacher
from reft_ray.testbed.answers import refusal
from reft_ray.testbed.synthetic import Sizes, SyntheticRows

LICENCES = {"Apache-2.0", "MIT", "CC BY 4.0", "CC BY-SA 3.0"}
VALIDATION_SOURCES = ("catqa", "harmbench_advtrain", "certified_safe", "self_instruct_seed")
SYNTHETIC = "reft_ray synthetic rows"
STEPS = 90
VALIDATION_PROMPTS = 600
ANSWERED = 450
"""Answered rows of each label from the public sources; the rest takes part in the refusal feature only."""
ANSWER_CHARACTERS = 300


def settings(steps: int, rows: int) -> TeacherConfig:
    """Stage 1 for SmolLM2; rank 4 and one layer keep the artefact under 8 MB. `rows` are those with answers.

    The filter reads the model's own features (feature=base): the adapter only learns to refuse and to answer.
    """
    batch_rows = 12
    return TeacherConfig.of(
        {
            "base": "smollm2",
            "epochs": steps * batch_rows / rows,
            "batch_rows": batch_rows,
            "micro_batch_tokens": 2048,
            "max_tokens": 128,
            "feature": "base",
            "lora": {"rank": 4},
            "optimizer": {"learning_rate": 1e-3},
            "sweep": (0.6, 0.8),
            "average_layers": 1,
            "reference_prompts": 1200,
            "answer_sample": 200,
            "checkpoint_every": 40,
            "log_every": 5,
        }
    )


def teacher_data(folder: Path, seed: int = 0) -> tuple[TeacherData, dict[str, Any]]:
    """The training data from a directory of labelled rows, and what the card says about it."""
    rng = random.Random(seed)  # noqa: S311
    counts: Counter[tuple[str, str, str]] = Counter()
    rows = []
    for row in _permissive(folder / "prompts.jsonl"):
        label = Label(row["label"])
        response = refusal(rng) if label is Label.HARMFUL else None
        rows.append(Example(chat(row["prompt"], response), label, row["source"]))
        counts[row["source"], row["licence"], label] += 1
    rng.shuffle(rows)
    train, validation = hold_out_sources(rows, VALIDATION_SOURCES)
    train = _with_answers(train, ANSWERED)
    helpful = [
        Example(chat(row["prompt"], row["response"]), Label.HARMLESS, row["source"])
        for row in _permissive(folder / "answers.jsonl")
        if row["source"] not in VALIDATION_SOURCES and len(row["response"]) <= ANSWER_CHARACTERS
    ][:ANSWERED]
    validation = validation[:VALIDATION_PROMPTS]
    synthetic = SyntheticRows.make(seed, Sizes(teacher_train=1200)).teacher_train
    train += [replace(row, source=SYNTHETIC) for row in synthetic]
    counts[SYNTHETIC, "Apache-2.0", "both"] += len(synthetic)
    sources = [
        {"source": source, "licence": licence, "label": label, "prompts": count, "use": _use(source)}
        for (source, licence, label), count in sorted(counts.items())
    ]
    return TeacherData(train, validation, helpful, sources), {"sources": sources}


def _with_answers(rows: Sequence[Example], most: int) -> list[Example]:
    """The rows, with answers kept for the first `most` of each label."""
    left = dict.fromkeys(Label, most)
    out = []
    for row in rows:
        if row.answered and row.label is not None and left[row.label]:
            left[row.label] -= 1
            out.append(row)
        else:
            out.append(replace(row, messages=row.prompt))
    return out


def _use(source: str) -> str:
    return "validation" if source in VALIDATION_SOURCES else "training"


def _permissive(file: Path) -> Iterator[Mapping[str, Any]]:
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["licence"] in LICENCES:
            yield row


def main(
    rows: Annotated[Path, typer.Option(help="Directory with prompts.jsonl and answers.jsonl.")],
    out: Annotated[Path, typer.Option(help="Directory of the artefact.")],
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = STEPS,
) -> None:
    """Train the prepared teacher."""
    data, about = teacher_data(rows)
    config = settings(steps, sum(row.answered for row in (*data.train, *data.answers)))

    def report(metrics: Mapping[str, Any]) -> None:
        shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in metrics.items() if v is not None}
        print(json.dumps(shown), flush=True)

    made = prepare_teacher(config, data, out, Resources(workers=0), f"prepared-{steps}", report)
    print(json.dumps({"id": made.id, **about}, indent=1))


if __name__ == "__main__":
    typer.run(main)
