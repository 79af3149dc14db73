"""Stage 1: prepare the Ref-Teacher.

    L_teacher = CE(refusals) + CE(helpful answers) + lambda * REG
    REG       = mean over harmful (1 - s(x)) + mean over harmless (1 + s(x))

Every labelled prompt takes part in REG, those with answers also in the cross entropy. Sums are divided by the
counts of the whole step, over all micro-batches and ranks, so that the gradient does not depend on the split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor

from reft_ray.core.batch import Batch
from reft_ray.core.forward import AllReduce, Forward, Predictions, single_rank
from reft_ray.core.geometry import Readout, separation_hinge
from reft_ray.core.losses import terms_sum, weighted_cross_entropy
from reft_ray.core.refusal import ClassSums


@dataclass(frozen=True, slots=True)
class TeacherCounts:
    """What the step's sums are divided by; at least 1 each."""

    refusal_tokens: int
    helpful_tokens: int
    harmful_rows: int
    harmless_rows: int

    @classmethod
    def of(cls, batches: Sequence[Batch], all_reduce: AllReduce = single_rank) -> TeacherCounts:
        """Count over micro-batches and ranks."""
        counts = [
            torch.stack(
                [
                    batch.harmful_B[batch.row_N].sum(),
                    (~batch.harmful_B)[batch.row_N].sum(),
                    batch.harmful_B.sum(),
                    batch.harmless_B.sum(),
                ]
            )
            for batch in batches
        ]
        return cls(*(max(int(count), 1) for count in all_reduce(terms_sum(counts)).tolist()))


@dataclass(frozen=True, slots=True)
class Regulariser:
    """REG: the score that it acts on, its weight lambda, and the margin above which a row is separated enough.

    Without a readout there is no REG.
    """

    readout: Readout | None = None
    weight: float = 0.5
    margin: float = 1.0


def teacher_loss(
    predictions: Tensor | Predictions, feature_BD: Tensor, batch: Batch, regulariser: Regulariser, counts: TeacherCounts
) -> tuple[Tensor, Tensor]:
    """(L_teacher, its terms [refusal, helpful, separation]) of a micro-batch."""
    harmful_N = batch.harmful_B[batch.row_N]
    weight_N2 = torch.stack([harmful_N / counts.refusal_tokens, ~harmful_N / counts.helpful_tokens], -1)
    entropy, each_2 = weighted_cross_entropy(predictions, batch.labels_N, weight_N2)
    separation = feature_BD.new_zeros((), dtype=torch.float32)
    if regulariser.readout is not None:
        score_B = regulariser.readout.score(feature_BD)
        harmful, harmless = separation_hinge(score_B, batch.label_B, regulariser.margin)
        separation = harmful / counts.harmful_rows + harmless / counts.harmless_rows
    return entropy + regulariser.weight * separation, torch.cat([each_2, separation.detach()[None]])


@dataclass(frozen=True, slots=True)
class TeacherTerms:
    """The loss terms of a step, one rank's share each, on its device; their sum over ranks is the term."""

    refusal: Tensor
    helpful: Tensor
    separation: Tensor
    total: Tensor

    @property
    def shares(self) -> dict[str, Tensor]:
        """The terms by name."""
        return {
            "total": self.total,
            "refusal": self.refusal,
            "helpful": self.helpful,
            "separation": self.separation,
        }


def teacher_step(
    model: Forward,
    batches: Sequence[Batch],
    layer: int,
    regulariser: Regulariser,
    all_reduce: AllReduce = single_rank,
    prompts: int | None = None,
) -> tuple[TeacherTerms, ClassSums]:
    """Accumulate the gradient of one step, a `backward` per micro-batch; returns its terms and its class sums.

    Gradients are left as this rank's share of the whole sum, and so are terms and class sums; the caller sums them
    over ranks. A rank without rows passes `core.batch.dummy_batch`, which has the width of a feature.

    The first `prompts` batches stop at `layer`, by default those without a label. Ranks that gather a layer at once
    state it: a dummy batch has no label and may have to run all layers.
    """
    counts = TeacherCounts.of(batches, all_reduce)
    sums: list[ClassSums] = []
    parts: list[Tensor] = []
    for number, batch in enumerate(batches):
        if batch.labelled if prompts is None else number >= prompts:
            predictions, feature_BD = model.predictions_and_features(batch, layer)
        else:
            feature_BD = model.features(batch, layer)
            predictions = Predictions.of(feature_BD.new_zeros(0, 1))
        loss, terms = teacher_loss(predictions, feature_BD, batch, regulariser, counts)
        if loss.requires_grad:
            loss.backward()
        sums.append(ClassSums(feature_BD, batch.label_B))
        parts.append(terms)
    refusal, helpful, separation = terms_sum(parts)
    total = refusal + helpful + regulariser.weight * separation
    return TeacherTerms(refusal, helpful, separation, total), reduce(add, sums)


@torch.no_grad()
def class_sums(model: Forward, batches: Sequence[Batch], layer: int) -> ClassSums:
    """Class sums of the features after one layer; later layers are not run."""
    return reduce(add, (ClassSums(model.features(batch, layer), batch.label_B) for batch in batches))
