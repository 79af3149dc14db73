"""Preference pairs in a run: rows with a chosen and a rejected answer to two sequences each, and their step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from reft_ray.baselines.step import GuidedStep
from reft_ray.core.batch import Batch, TokenizedExample
from reft_ray.core.conversation import Conversation, Example
from reft_ray.core.errors import ReftError
from reft_ray.core.forward import AllReduce, Forward
from reft_ray.core.guided import Distillation, GuidedTerms
from reft_ray.core.preference import Dpo, preference_step
from reft_ray.finetuning.config import FinetuneConfig
from reft_ray.finetuning.rows import SkippedRows
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.lora import attach_saved, is_adapted, using_adapter
from reft_ray.rows.text import conversation_from

AtStart = Callable[[], AbstractContextManager[None]]
START = "start"
"""The name of the adapter with the weights at the start, where these are not the base's."""


def pair_of(row: Example) -> tuple[Example, Example]:
    """A row's two dialogues; only the answers in which they differ are learned. Raises ReftError without a pair."""
    rejected = conversation_from(row.rejected)
    if not rejected or not row.answered or rejected[-1].role != "assistant":
        raise ReftError("the row is not a preference pair: it has no rejected answer")
    shared = 0
    while shared < min(len(row.messages), len(rejected)) and _same(row.messages[shared], rejected[shared]):
        shared += 1
    if shared == max(len(row.messages), len(rejected)):
        raise ReftError("the chosen and the rejected answer of the pair are the same")

    def learned(turns: Conversation) -> Example:
        before = (replace(turn, trained=False) for turn in turns[:shared])
        return replace(row, messages=(*before, *turns[shared:]))

    return learned(row.messages), learned(rejected)


def _same(one: object, other: object) -> bool:
    names = ("role", "content", "calls")
    return all(getattr(one, name) == getattr(other, name) for name in names)


def encode_pairs(
    chat: ChatFormat, rows: Sequence[Example], max_tokens: int | None, skipped: SkippedRows
) -> list[TokenizedExample]:
    """The chosen (index 2 i) and rejected (2 i + 1) sequence of each pair that fits; the others are counted."""
    encoded: list[TokenizedExample] = []
    for row in rows:
        try:
            pair = [chat.encode(side, max_tokens=max_tokens) for side in pair_of(row)]
        except ReftError as error:
            skipped.add(row, error)
            continue
        encoded += [replace(side, index=len(encoded) + place) for place, side in enumerate(pair)]
    return encoded


class PreferenceStep(GuidedStep):
    """`core.preference` as the step of a run."""

    def __init__(
        self,
        config: FinetuneConfig,
        student: Forward,
        distillation: Distillation,
        all_reduce: AllReduce,
        at_start: AtStart,
    ) -> None:
        super().__init__(student, distillation, all_reduce)
        self.dpo = Dpo(config.preference.beta, config.preference.sft_weight, config.batch_rows)
        self.at_start = at_start

    def __call__(self, user: Sequence[Batch], alignment: Sequence[Batch]) -> GuidedTerms:
        return preference_step(
            self.student, self.at_start, user, alignment, self.distillation, self.dpo, self.all_reduce
        )


def weights_at_start(model: nn.Module, start: Path | None) -> AtStart:
    """What puts the weights at the start into a model: those of the adapter `start`, or the base's."""
    assert is_adapted(model), "the configuration asks for LoRA"
    if start is None:
        return model.disable_adapter
    active = str(model.active_adapter)
    attach_saved(model, START, start)
    model.set_adapter(active)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f".{active}." in name)
    return partial(using_adapter, model, START)
