"""Stage 2: guided finetuning, the file to read first.

    kept = { (x, y) in user data : s(x) <= tau }                                     (reft_ray.screening)
    L    = sum CE(kept rows) / N_user + alpha * T^2 * sum KL(p_teacher || p_student) / N_align

The student starts from the *base* weights. N_user and N_align count trained tokens over all ranks and micro-batches
of the step, so that the gradient does not depend on how the step is split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from reft_ray.core.batch import Batch
from reft_ray.core.forward import Forward
from reft_ray.core.losses import correct_sum, cross_entropy_sum, kl_sum, topk_kl_sum
from reft_ray.core.refusal import AllReduce, single_rank
from reft_ray.core.targets import TargetSource


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
        """Whether alignment rows are learned beside the user's."""
        return self in (Method.DISTILL, Method.GUIDED)


AlignmentLoss = Callable[[Batch, Tensor], Tensor]
"""(alignment batch, student logits [N, V]) -> summed loss over the batch's trained positions, in nats."""


def hard_labels(batch: Batch, student_NV: Tensor) -> Tensor:
    """Cross entropy on the alignment answers themselves: the ablation without soft labels."""
    return cross_entropy_sum(student_NV, batch.targets_N)


def live_teacher(teacher: Forward, temperature: float = 1.0) -> AlignmentLoss:
    """KL to a teacher that is run on every alignment batch."""

    def loss(batch: Batch, student_NV: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_NV = teacher(batch).logits_NV
        assert teacher_NV is not None
        return temperature**2 * kl_sum(teacher_NV, student_NV, temperature)

    return loss


def cached_teacher(source: TargetSource, temperature: float = 1.0) -> AlignmentLoss:
    """KL to soft labels that were computed once; no teacher forward."""

    def loss(batch: Batch, student_NV: Tensor) -> Tensor:
        if not len(student_NV):
            # A rank without rows takes part in the step with a batch that stands for none of the source's.
            return student_NV.float().sum()
        targets = source.rows(batch.index_B.tolist()).to(student_NV.device)
        return temperature**2 * topk_kl_sum(targets, student_NV, temperature)

    return loss


@dataclass(frozen=True, slots=True)
class GuidedTerms:
    """The loss terms of a step over all ranks, and the token counts that they were divided by.

    `user_correct` counts the user's tokens that the student held likeliest before the step; None where nobody counted.
    """

    task: float
    distill: float
    total: float
    user_tokens: int
    alignment_tokens: int
    user_correct: int | None = None


def guided_step(
    student: Forward,
    user: Sequence[Batch],
    alignment: Sequence[Batch] = (),
    alignment_loss: AlignmentLoss = hard_labels,
    distill_weight: float = 1.0,
    all_reduce: AllReduce = single_rank,
) -> GuidedTerms:
    """Accumulate the gradient of one step over its micro-batches.

    Gradients are left as this rank's share of the whole sum; the caller sums them over ranks. A rank without rows
    still takes part in the reductions.
    """
    counts = all_reduce(torch.tensor([_trained(user), _trained(alignment)], dtype=torch.float64))
    user_tokens, alignment_tokens = (int(count) for count in counts)
    terms = torch.zeros(3, dtype=torch.float64)
    for batch in user:
        logits_NV = student(batch).logits_NV
        assert logits_NV is not None
        task = cross_entropy_sum(logits_NV, batch.targets_N) / user_tokens
        task.backward()
        terms[0] += float(task.detach())
        terms[2] += float(correct_sum(logits_NV, batch.targets_N))
    for batch in alignment:
        logits_NV = student(batch).logits_NV
        assert logits_NV is not None
        distill = alignment_loss(batch, logits_NV) / alignment_tokens
        (distill_weight * distill).backward()
        terms[1] += float(distill.detach())
    task_term, distill_term, correct = (float(term) for term in all_reduce(terms))
    total = task_term + distill_weight * distill_term
    return GuidedTerms(task_term, distill_term, total, user_tokens, alignment_tokens, int(correct))


def _trained(batches: Sequence[Batch]) -> int:
    return sum(int(batch.trained_BT.sum()) for batch in batches)
