"""AUROC with a 95 % bootstrap interval, and the interval of the difference of two filters on the same rows.

Rows are resampled within each class, as the class sizes are chosen by the experimenter. All filters share each
resample (paired bootstrap).

Shape suffixes: S filters, B rows, R resamples, G distinct scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reft_ray.core.proportion import wilson
from reft_ray.evaluation.intervals import RESAMPLES, percentile_interval

_CHUNK_DRAWS = 2_000_000


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure between its 95 % bounds."""

    value: float
    low: float
    high: float

    def as_list(self) -> list[float]:
        """The JSON of reports: value, low, high."""
        return [self.value, self.low, self.high]


class AurocBootstrap:
    """Resampled AUROCs of filters on one set of rows. Raises ValueError unless both classes are present."""

    def __init__(self, score_SB: Sequence[Tensor], label_B: Tensor, seed: int = 0, resamples: int = RESAMPLES) -> None:
        label_B = label_B.bool()
        self.counts = int((~label_B).sum()), int(label_B.sum())
        if not all(self.counts):
            raise ValueError("an AUROC needs rows of both classes")
        generator = torch.Generator().manual_seed(seed)
        chunk = max(1, _CHUNK_DRAWS // len(label_B))
        whole_B = torch.ones(1, len(label_B), dtype=torch.float64)
        self.value_S = torch.cat([_auroc(score_B, label_B, whole_B) for score_B in score_SB])
        draws = []
        for start in range(0, resamples, chunk):
            weight_RB = torch.empty(min(chunk, resamples - start), len(label_B), dtype=torch.float64)
            for inside_B in (label_B, ~label_B):
                weight_RB[:, inside_B] = _draw_counts(len(weight_RB), int(inside_B.sum()), generator)
            draws.append(torch.stack([_auroc(score_B, label_B, weight_RB) for score_B in score_SB]))
        self.draws_SR = torch.cat(draws, dim=1)

    def interval(self, index: int) -> Interval:
        """One filter's AUROC. A perfect ranking has no bootstrap variance; so: Wilson's bound of the rarer class."""
        value = float(self.value_S[index])
        low, high = percentile_interval(self.draws_SR[index])
        fewest = min(self.counts)
        if value == 1.0:
            low = wilson(fewest, fewest)[0]
        elif value == 0.0:
            high = wilson(0, fewest)[1]
        return Interval(value, low, high)

    def difference(self, index: int, other: int) -> Interval:
        """AUROC of one filter minus that of another, on the same resamples."""
        low, high = percentile_interval(self.draws_SR[index] - self.draws_SR[other])
        return Interval(float(self.value_S[index] - self.value_S[other]), low, high)


def _draw_counts(resamples: int, rows: int, generator: torch.Generator) -> Tensor:
    """How often each of `rows` rows is drawn, [R, B]."""
    drawn_RB = torch.randint(rows, (resamples, rows), generator=generator)
    return torch.zeros(resamples, rows, dtype=torch.float64).scatter_add_(
        1, drawn_RB, torch.ones(resamples, rows, dtype=torch.float64)
    )


def _auroc(score_B: Tensor, label_B: Tensor, weight_RB: Tensor) -> Tensor:
    """AUROC under row weights, [R]; ties count half."""
    _, group_B = torch.unique(score_B, return_inverse=True)
    groups = int(group_B.max()) + 1

    def grouped(inside_B: Tensor) -> Tensor:
        empty = torch.zeros(len(weight_RB), groups, dtype=torch.float64)
        return empty.index_add_(1, group_B[inside_B], weight_RB[:, inside_B])

    harmful_RG, harmless_RG = grouped(label_B), grouped(~label_B)
    below_RG = harmless_RG.cumsum(1) - 0.5 * harmless_RG
    return (harmful_RG * below_RG).sum(1) / (harmful_RG.sum(1) * harmless_RG.sum(1))
