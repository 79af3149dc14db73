"""Stage 2: guided finetuning, the file to read first.

    kept = { (x, y) in user data : s(x) <= tau }                                     (reft_ray.screening)
    L    = sum CE(kept rows) / N_user + alpha * T^2 * sum KL(p_teacher || p_student) / N_align

The student starts from the *base* weights. N_user and N_align count labelled tokens over all ranks and micro-batches
of the step, so that the gradient does not depend on how the step is split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from reft_ray.core.batch import Batch
from reft_ray.core.forward import AllReduce, Forward, Predictions, single_rank
from reft_ray.core.losses import cross_entropy_and_correct, divergence_sum, label_counts, terms_sum
from reft_ray.core.targets import SoftTargets, TargetSource


class Method(StrEnum):
    """Which of the two defences a student gets: the filter before training, distillation during it."""

    SFT = "sft"
    FILTER = "filter"
    DISTILL = "distill"
    GUIDED = "guided"

    @property
    def filters(self) -> bool:
        """Whether blocked user rows are dropped."""
        return self in (Method.FILTER, Method.GUIDED)

    @property
    def distills(self) -> bool:
        """Whether alignment rows are learned in addition to the user's."""
        return self in (Method.DISTILL, Method.GUIDED)


LabelSource = Callable[[Batch], Tensor | Predictions | SoftTargets]
"""What the labelled positions of an alignment batch are distilled from: teacher logits [N, V] or soft labels."""


def hard_labels(batch: Batch) -> SoftTargets:
    """The alignment answers themselves, as a teacher that is certain: the ablation without soft labels (T = 1)."""
    certain_N1 = torch.zeros(len(batch.labels_N), 1, device=batch.labels_N.device)
    return SoftTargets(batch.labels_N[:, None], certain_N1, certain_N1[:, 0])


def live_teacher(teacher: Forward) -> LabelSource:
    """A teacher that is run on every alignment batch."""
    return torch.no_grad()(teacher.predictions)


def cached_teacher(source: TargetSource) -> LabelSource:
    """Soft labels that were computed once; no teacher forward."""

    def labels(batch: Batch) -> SoftTargets:
        # `dummy_batch` has no label, and its row number is not a row of the source.
        return source.rows(batch.index_B.tolist()).to(batch.ids_BT.device) if batch.labelled else hard_labels(batch)

    return labels


@dataclass(frozen=True, slots=True)
class Distillation:
    """The alignment term: its labels, its weight alpha, and the temperature T of both distributions."""

    labels: LabelSource = hard_labels
    alpha: float = 1.0
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class GuidedTerms:
    """The loss terms of a step and the token counts that they were divided by.

    Counts are those of all ranks. Terms are one rank's share, on its device; their sum over ranks is the term.
    `user_correct` counts the user's tokens that the student predicted before the step; None where not counted.
    """

    task: Tensor
    distill: Tensor
    total: Tensor
    user_tokens: int
    alignment_tokens: int
    user_correct: Tensor | None = None

    @property
    def shares(self) -> dict[str, Tensor]:
        """The terms by name."""
        named = {"loss": self.total, "task": self.task, "distill": self.distill}
        return named if self.user_correct is None else named | {"correct": self.user_correct}


def guided_step(
    student: Forward,
    user: Sequence[Batch],
    alignment: Sequence[Batch] = (),
    distillation: Distillation = Distillation(),
    all_reduce: AllReduce = single_rank,
) -> GuidedTerms:
    """Accumulate the gradient of one step, a `backward` per micro-batch.

    Gradients are left as this rank's share of the whole sum; the caller sums them over ranks. A rank without rows
    still takes part in the reduction of the counts.
    """
    user_tokens, alignment_tokens = label_counts(user, alignment, all_reduce=all_reduce)
    parts = [torch.zeros(3)]
    for batch in user:
        entropy, correct = cross_entropy_and_correct(student.predictions(batch), batch.labels_N)
        # With no token at all a term is a sum over nothing.
        task = entropy / max(user_tokens, 1)
        task.backward()
        parts.append(torch.stack([task.detach(), torch.zeros_like(correct), correct]))
    for batch in alignment:
        divergence = divergence_sum(distillation.labels(batch), student.predictions(batch), distillation.temperature)
        distill = distillation.temperature**2 * divergence / max(alignment_tokens, 1)
        (distillation.alpha * distill).backward()
        none = torch.zeros_like(distill.detach())
        parts.append(torch.stack([none, distill.detach(), none]))
    task, distill, correct = terms_sum(parts)
    total = task + distillation.alpha * distill
    return GuidedTerms(task, distill, total, user_tokens, alignment_tokens, correct)
