"""Stage 1: prepare the Ref-Teacher.

    L_teacher = CE(refusals) + CE(helpful answers) + lambda * REG
    REG       = mean over harmful (1 - s(x)) + mean over harmless (1 + s(x))

Every labelled prompt takes part in REG, those with answers also in the cross entropy. Sums are divided by the
counts of the whole step, over all micro-batches and ranks, so that the gradient does not depend on the split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from reft_ray.core.batch import Batch
from reft_ray.core.forward import Forward
from reft_ray.core.losses import cross_entropy_sum, separation_sums
from reft_ray.core.refusal import AllReduce, ClassSums, RunningRefusal, single_rank


@dataclass(frozen=True, slots=True)
class TeacherTotals:
    """What the step's sums are divided by."""

    refusal_tokens: int
    helpful_tokens: int
    harmful_rows: int
    harmless_rows: int

    @classmethod
    def of(cls, batches: Sequence[Batch], all_reduce: AllReduce = single_rank) -> TeacherTotals:
        """Count over micro-batches and ranks."""
        counts = torch.zeros(4, dtype=torch.float64)
        for batch in batches:
            tokens_B = batch.trained_BT.sum(-1)
            counts += torch.stack(
                [
                    tokens_B[batch.harmful_B].sum(),
                    tokens_B[~batch.harmful_B].sum(),
                    batch.harmful_B.sum(),
                    batch.harmless_B.sum(),
                ]
            ).cpu()
        return cls(*(int(count) for count in all_reduce(counts)))


@dataclass(frozen=True, slots=True)
class TeacherTerms:
    """The loss terms of a step, summed over its micro-batches and already divided."""

    refusal: float
    helpful: float
    separation: float
    total: float


def teacher_step(
    model: Forward,
    batches: Sequence[Batch],
    running: RunningRefusal,
    layer: int,
    separation_weight: float,
    all_reduce: AllReduce = single_rank,
    refresh: bool = True,
) -> TeacherTerms:
    """Accumulate the gradient of one step over its micro-batches, then (by default) refresh R_l.

    The very first step has no R_l yet: it is taken from that step's own features before any loss. Gradients are
    left as this rank's share of the whole sum; the caller sums them over ranks. Returned terms are over all ranks.
    A rank without rows brings `core.batch.dummy_batch`, because the width of the sums is that of a feature.
    """
    totals = TeacherTotals.of(batches, all_reduce)
    if running.refusal_D is None:
        running.update(class_sums(model, batches, layer).reduce(all_reduce))
    refusal_D = running.refusal_D
    sums: ClassSums | None = None
    terms = torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        answers = bool(batch.trained_BT.any())
        out = model(batch, logits=answers, layer=layer)
        assert out.feature_BD is not None
        loss = out.feature_BD.new_zeros((), dtype=torch.float32)
        if answers:
            assert out.logits_NV is not None
            refusing_N = batch.harmful_B[:, None].expand_as(batch.trained_BT)[batch.trained_BT]
            for slot, (chosen_N, tokens) in enumerate(
                ((refusing_N, totals.refusal_tokens), (~refusing_N, totals.helpful_tokens))
            ):
                if tokens and bool(chosen_N.any()):
                    term = cross_entropy_sum(out.logits_NV[chosen_N], batch.targets_N[chosen_N]) / tokens
                    terms[slot] += float(term.detach())
                    loss = loss + term
        if refusal_D is not None:
            harmful, harmless = separation_sums(out.feature_BD, refusal_D, batch.label_B)
            separation = harmful / max(totals.harmful_rows, 1) + harmless / max(totals.harmless_rows, 1)
            terms[2] += float(separation.detach())
            loss = loss + separation_weight * separation
        if loss.requires_grad:
            loss.backward()
        if sums is None:
            sums = ClassSums(out.feature_BD.shape[-1], out.feature_BD.device)
        sums.add(out.feature_BD, batch.label_B)
    if refresh and sums is not None:
        running.update(sums.reduce(all_reduce))
    refusal, helpful, separation = all_reduce(terms).tolist()
    return TeacherTerms(refusal, helpful, separation, refusal + helpful + separation_weight * separation)


@torch.no_grad()
def class_sums(model: Forward, batches: Sequence[Batch], layer: int) -> ClassSums:
    """Class sums of the features after one layer; the layers above are not run."""
    sums: ClassSums | None = None
    for batch in batches:
        feature_BD = model(batch, logits=False, layer=layer).feature_BD
        assert feature_BD is not None
        sums = sums or ClassSums(feature_BD.shape[-1], feature_BD.device)
        sums.add(feature_BD, batch.label_B)
    if sums is None:
        raise ValueError("class means need at least one batch")
    return sums
