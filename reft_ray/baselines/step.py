"""The interface between a training loop and a method: the rows that one optimiser step reads, and its gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from reft_ray.core.batch import Batch
from reft_ray.core.forward import AllReduce, Forward, single_rank
from reft_ray.core.guided import Distillation, GuidedTerms, guided_step


@dataclass(frozen=True, slots=True)
class Streams:
    """Which of the two streams of rows the next step reads."""

    user: bool = True
    alignment: bool = True


class Step(Protocol):
    """One method. It leaves this rank's share of the gradient on the parameters; the loop does the rest."""

    @property
    def streams(self) -> Streams:
        """What the next call reads."""
        ...

    def __call__(self, user: Sequence[Batch], alignment: Sequence[Batch]) -> GuidedTerms:
        """Accumulate the gradient of one step over its micro-batches."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to keep; nothing for most methods."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore a checkpoint's state."""
        assert not state, "this method keeps no state"


class GuidedStep(Step):
    """The method of this project, and plain finetuning without alignment rows (`core.guided`)."""

    streams = Streams()

    def __init__(
        self, student: Forward, distillation: Distillation | None = None, all_reduce: AllReduce = single_rank
    ) -> None:
        self.student = student
        self.distillation = distillation or Distillation()
        self.all_reduce = all_reduce

    def __call__(self, user: Sequence[Batch], alignment: Sequence[Batch]) -> GuidedTerms:
        return guided_step(self.student, user, alignment, self.distillation, self.all_reduce)
