"""The seam between a training loop and a method: what one optimiser step learns from, and its gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from reft_ray.core.batch import Batch
from reft_ray.core.forward import Forward
from reft_ray.core.guided import AlignmentLoss, GuidedTerms, guided_step, hard_labels
from reft_ray.core.refusal import AllReduce, single_rank


@dataclass(frozen=True, slots=True)
class Streams:
    """Which of the two streams of rows the next step reads."""

    user: bool = True
    alignment: bool = True


class Step(Protocol):
    """One method at work. It leaves this rank's share of the gradient on the parameters; the loop does the rest."""

    @property
    def streams(self) -> Streams:
        """What the next call reads."""
        ...

    def __call__(self, user: Sequence[Batch], alignment: Sequence[Batch]) -> GuidedTerms:
        """Accumulate the gradient of one step over its micro-batches."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to keep; most methods remember nothing."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put a checkpoint's state back."""
        ...


class GuidedStep:
    """The method of this project, and plain finetuning where there are no alignment rows (`core.guided`)."""

    streams = Streams()

    def __init__(
        self,
        student: Forward,
        alignment_loss: AlignmentLoss = hard_labels,
        distill_weight: float = 1.0,
        all_reduce: AllReduce = single_rank,
    ) -> None:
        self.student = student
        self.alignment_loss = alignment_loss
        self.distill_weight = distill_weight
        self.all_reduce = all_reduce

    def __call__(self, user: Sequence[Batch], alignment: Sequence[Batch]) -> GuidedTerms:
        """The two terms of the loss."""
        return guided_step(self.student, user, alignment, self.alignment_loss, self.distill_weight, self.all_reduce)

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Nothing."""
