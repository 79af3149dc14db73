"""Preference pairs in a run: rows with a chosen and a rejected answer to two sequences each, and their step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from torch import nn

from reft_ray.baselines.step import GuidedStep
from reft_ray.core.batch import Batch
from reft_ray.core.forward import AllReduce, Forward
from reft_ray.core.guided import Distillation, GuidedTerms
from reft_ray.core.preference import Dpo, preference_step
from reft_ray.finetuning.config import FinetuneConfig
from reft_ray.hf.lora import attach_saved, is_adapted, using_adapter

AtStart = Callable[[], AbstractContextManager[None]]
START = "start"
"""The name of the adapter with the weights at the start, where these are not the base's."""


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
