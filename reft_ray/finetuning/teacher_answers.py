"""How much of its adapter a teacher answers with: the share that makes the fewest mistakes on validation prompts.

Trained on few sources of harmless prompts, a teacher refuses those of others as well. Weights between the base's and
the trained ones generalise better to new sources (WiSE-FT, arXiv 2109.01903).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from reft_ray.core.conversation import Example, Label
from reft_ray.evaluation.judges import Grade, RefusalMatcher
from reft_ray.finetuning.model import TrainableModel
from reft_ray.hf.generate import Responder
from reft_ray.hf.lora import scaled_adapters

_PROMPTS = 60
"""Validation prompts of each label that are answered."""
_TOKENS = 12
"""A refusal shows in its first words."""
_RIGHT = {Label.HARMFUL: Grade.REFUSED, Label.HARMLESS: Grade.COMPLIED}


def best_share(trainable_model: TrainableModel, validation: Sequence[Example], shares: Sequence[float]) -> float:
    """The share of the adapter with the fewest wrong answers, both labels counting alike; the largest of equals."""
    rows = {label: _some(validation, label) for label in Label}
    return min(sorted(shares, reverse=True), key=lambda share: _mistakes(trainable_model, rows, share))


def _some(rows: Sequence[Example], label: Label) -> list[Example]:
    of_label = [row for row in rows if row.label is label]
    return random.Random(f"shares/{label}").sample(of_label, min(_PROMPTS, len(of_label)))  # noqa: S311


def _mistakes(trainable_model: TrainableModel, rows: dict[Label, list[Example]], share: float) -> float:
    """The share of harmful prompts that are not refused plus that of harmless ones that are not answered."""
    judge = RefusalMatcher()
    respond = Responder(trainable_model.model, trainable_model.chat, _TOKENS)
    wrong = 0.0
    with scaled_adapters(trainable_model.model, share):
        for label, examples in rows.items():
            prompts = [row.prompt for row in examples]
            grades = judge.judge(prompts, respond(prompts))
            wrong += sum(grade is not _RIGHT[label] for grade in grades) / len(grades)
    return wrong
