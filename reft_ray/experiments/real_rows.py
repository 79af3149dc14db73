"""Real public rows from a folder outside the checkout; the repository does not contain them.

teacher/{prompts,refusals,answers}.jsonl     labelled prompts, and answers to some of them
tasks/{sst2,agnews,gsm8k}_{train,dev}.jsonl  chat rows
attacks/{poison_prompts,hs_prompts,over_refusal_prompts}.jsonl
dev/prompts.jsonl                            labelled prompts of further sources
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from reft_ray.core.conversation import Example, Label, chat
from reft_ray.finetuning.prompts import hold_out_sources, join_answers, read_labelled, without_prompts_of
from reft_ray.finetuning.teacher_loop import TeacherData

HELD_OUT = ["catqa", "harmbench_advtrain", "dangerousqa", "certified_safe", "dolly_1000"]
"""Validation sources: they choose the teacher's layer, early stop and thresholds."""

OPENING = "Sure, here is how to do that. Step 1:"
"""A placeholder for a complying answer: the public rows contain no harmful completions."""

PROMPT_CHARACTERS = 400
"""Longer prompts are skipped: the small base was trained on 256 tokens."""


def short(rows: Sequence[Example]) -> list[Example]:
    """Rows whose last prompt is shorter than PROMPT_CHARACTERS."""
    return [row for row in rows if len(row.prompt[-1].content) < PROMPT_CHARACTERS]


def teacher_rows(data: Path) -> TeacherData:
    """The teacher's training and validation rows. Prompts that occur in an answer file only teach answers."""
    prompts, answers = join_answers(
        read_labelled(data / "teacher/prompts.jsonl"),
        [
            *read_labelled(data / "teacher/refusals.jsonl", Label.HARMFUL),
            *read_labelled(data / "teacher/answers.jsonl", Label.HARMLESS),
        ],
    )
    train, validation = hold_out_sources(short(prompts), HELD_OUT)
    further = [row for row in short(answers) if row.source not in HELD_OUT]
    return TeacherData(without_prompts_of(train, validation), validation, without_prompts_of(further, validation))


def complying(rows: Sequence[Example]) -> list[Example]:
    """The same prompts, each with a placeholder for a complying answer."""
    return [replace(row, messages=(*row.prompt, *chat("", OPENING)[1:])) for row in rows]


def mixed(poison: Sequence[Example], task: Sequence[Example], n: int, ratio: float, seed: int) -> list[Example]:
    """`round(n * ratio)` poisoned rows and task rows for the rest, drawn and shuffled by a seed."""
    rng = random.Random(seed)  # noqa: S311 - an order, not a secret
    harmful = round(n * ratio)
    rows = rng.sample(list(poison), harmful) + rng.sample(list(task), n - harmful)
    rng.shuffle(rows)
    return rows
