"""Measures of a filter: ranking quality, operating points and calibration.

Scores are higher for harmful; `label_B` is 1 for harmful and 0 for harmless. Shapes: B rows, P points.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reft_ray.core.verdict import Calibration, Thresholds


def _checked(score_B: Tensor, label_B: Tensor) -> tuple[Tensor, Tensor]:
    score_B, label_B = score_B.double(), label_B.bool()
    if not label_B.any() or label_B.all():
        raise ValueError("filter quality needs rows of both classes")
    return score_B, label_B


def _curve(score_B: Tensor, label_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(thresholds, true positives, false positives), one entry per distinct score, from the highest down."""
    order = torch.argsort(score_B, descending=True, stable=True)
    score_B, label_B = score_B[order], label_B[order]
    last = torch.ones_like(label_B)
    last[:-1] = score_B[1:] != score_B[:-1]
    hits = label_B.double().cumsum(0)[last]
    alarms = (~label_B).double().cumsum(0)[last]
    return score_B[last], hits, alarms


def roc(score_B: Tensor, label_B: Tensor) -> tuple[Tensor, Tensor]:
    """(false-positive rates, recalls) from (0, 0) to (1, 1), one point per distinct score."""
    score_B, label_B = _checked(score_B, label_B)
    _, hits, alarms = _curve(score_B, label_B)
    zero = torch.zeros(1, dtype=torch.float64)
    return torch.cat([zero, alarms / alarms[-1]]), torch.cat([zero, hits / hits[-1]])


def auroc(score_B: Tensor, label_B: Tensor) -> float:
    """Probability that a harmful row scores above a harmless one; ties count half."""
    fpr, recall = roc(score_B, label_B)
    return float(torch.trapezoid(recall, fpr))


def auprc(score_B: Tensor, label_B: Tensor) -> float:
    """Average precision: precision summed over the steps in recall, without interpolation."""
    score_B, label_B = _checked(score_B, label_B)
    _, hits, alarms = _curve(score_B, label_B)
    steps = torch.diff(hits / hits[-1], prepend=torch.zeros(1, dtype=torch.float64))
    return float((steps * hits / (hits + alarms)).sum())


def recall_at_fpr(score_B: Tensor, label_B: Tensor, fpr: float) -> float:
    """The highest recall of any threshold whose false-positive rate is at most `fpr`."""
    score_B, label_B = _checked(score_B, label_B)
    _, hits, alarms = _curve(score_B, label_B)
    allowed = alarms / alarms[-1] <= fpr
    return float((hits[allowed] / hits[-1]).max()) if allowed.any() else 0.0


def precision_recall(score_B: Tensor, label_B: Tensor) -> tuple[Tensor, Tensor]:
    """(recalls, precisions), one point per distinct score, from the highest score down."""
    score_B, label_B = _checked(score_B, label_B)
    _, hits, alarms = _curve(score_B, label_B)
    return hits / hits[-1], hits / (hits + alarms)


def curve_points(x_P: Tensor, y_P: Tensor, most: int = 500) -> list[list[float]]:
    """[x, y] of at most `most` points of a curve, evenly spaced, with both ends."""
    count = len(x_P)
    index = torch.arange(count) if count <= most else torch.linspace(0, count - 1, most).round().long()
    return torch.stack([x_P[index], y_P[index]], dim=1).tolist()


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """Share of harmful and of harmless rows above a threshold."""

    threshold: float
    recall: float
    fpr: float


def operating_point(score_B: Tensor, label_B: Tensor, threshold: float) -> OperatingPoint:
    """Recall and FPR of one threshold: a row is caught if its score is above it."""
    score_B, label_B = _checked(score_B, label_B)
    caught = score_B > threshold
    return OperatingPoint(threshold, float(caught[label_B].double().mean()), float(caught[~label_B].double().mean()))


def threshold_for_recall(score_B: Tensor, label_B: Tensor, recall: float) -> float:
    """Of the thresholds that catch at least `recall` of the harmful rows, that with the greatest recall minus FPR.

    That is Youden's J: a single harmless row with a high score does not cost as many harmful ones as `recall` allows.
    Any threshold down to the next score is equivalent: the middle leaves new rows of either class most margin.
    """
    score_B, label_B = _checked(score_B, label_B)
    thresholds, hits, alarms = _curve(score_B, label_B)
    caught, fpr = hits / hits[-1], alarms / alarms[-1]
    allowed = torch.nonzero(caught >= recall).flatten()
    index = int(allowed[(caught - fpr)[allowed].argmax()])
    return _midway(thresholds, index, index + 1)


def threshold_for_fpr(score_B: Tensor, label_B: Tensor, fpr: float) -> float:
    """The lowest threshold that catches at most `fpr` of the harmless rows, midway to the next one that would not."""
    score_B, label_B = _checked(score_B, label_B)
    thresholds, _, alarms = _curve(score_B, label_B)
    allowed = torch.nonzero(alarms / alarms[-1] <= fpr)
    if not len(allowed):
        return float(thresholds[0])
    index = int(allowed[-1])
    return _midway(thresholds, index, index + 1)


def _midway(thresholds: Tensor, above: int, below: int) -> float:
    low = thresholds[below] if below < len(thresholds) else thresholds.new_tensor(-1.0)
    return max(-1.0, float((thresholds[above] + low) / 2))


def separation(score_B: Tensor, label_B: Tensor) -> tuple[float, float]:
    """The key to compare filters by: AUROC in thousandths, then the gap between the class means.

    A ranking saturates long before a filter is at its best; among equals the wider gap wins.
    """
    ranked = auroc(score_B, label_B)
    return round(ranked, 3), float(score_B[label_B == 1].mean() - score_B[label_B == 0].mean())


@dataclass(frozen=True, slots=True)
class Target:
    """What a threshold must reach: a recall of harmful rows, or a false-positive rate on harmless ones."""

    recall: float | None = None
    fpr: float | None = None

    def __post_init__(self) -> None:
        if (self.recall is None) == (self.fpr is None):
            raise ValueError("state either a recall or a false-positive rate, not both")

    def threshold(self, score_B: Tensor, label_B: Tensor) -> float:
        """The threshold that reaches it on these rows."""
        if self.recall is not None:
            return threshold_for_recall(score_B, label_B, self.recall)
        return threshold_for_fpr(score_B, label_B, self.fpr or 0.0)


@dataclass(frozen=True, slots=True)
class Targets:
    """The operator's targets for both thresholds. The defaults block 1 % of harmless prompts and review 5 %."""

    block: Target = Target(fpr=0.01)
    review: Target = Target(fpr=0.05)


def choose_thresholds(score_B: Tensor, label_B: Tensor, targets: Targets) -> Thresholds:
    """Thresholds on validation rows; review is never above block."""
    block = min(1.0, targets.block.threshold(score_B, label_B))
    return Thresholds(min(block, targets.review.threshold(score_B, label_B)), block)


_ROUNDING = 1e-2
"""Scores of one text differ by less than this between batches and precisions: the filter may read in bfloat16."""


def response_offset(score_B: Tensor, review: float, fpr: float) -> float:
    """How much higher an answer must score than a prompt to be withheld, from scores of harmless answers.

    At most a share `fpr` of them reaches the review threshold raised by it. If all of them are near the harmless
    end, other kinds of answers may score higher: nothing on the harmless side (cosine below 0) is withheld.
    """
    highest = float(score_B.quantile(1.0 - fpr, interpolation="higher"))
    return max(0.0, -review, highest + _ROUNDING - review)


def fit_calibration(score_B: Tensor, label_B: Tensor) -> Calibration:
    """Platt scaling with Platt's smoothed targets, which keep the slope finite on separable rows."""
    score_B, label_B = _checked(score_B, label_B)
    positive, negative = int(label_B.sum()), int((~label_B).sum())
    target_B = torch.where(label_B, (positive + 1) / (positive + 2), 1 / (negative + 2)).double()
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure() -> float:
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(weights[0] * score_B + weights[1], target_B)
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)
    slope, intercept = weights.detach().tolist()
    return Calibration(slope, intercept)


def expected_calibration_error(probability_B: Tensor, label_B: Tensor, bins: int = 10) -> float:
    """Mean gap between probability and observed share over equal-width bins, weighted by rows."""
    probability_B, label_B = probability_B.double(), label_B.double()
    bin_B = (probability_B * bins).long().clamp(0, bins - 1)
    gap = 0.0
    for index in range(bins):
        inside = bin_B == index
        if inside.any():
            gap += float(inside.double().mean()) * abs(
                float(probability_B[inside].mean()) - float(label_B[inside].mean())
            )
    return gap


@dataclass(frozen=True, slots=True)
class FilterQuality:
    """A filter on labelled rows; `recall` and `fpr` at the block threshold, all as shares in [0, 1]."""

    rows: int
    harmful: int
    auroc: float
    auprc: float
    recall_at_1_fpr: float
    recall: float
    fpr: float
    threshold: float


def filter_quality(score_B: Tensor, label_B: Tensor, thresholds: Thresholds) -> FilterQuality:
    """All figures of one set of labelled rows. Raises ValueError unless both classes are present."""
    point = operating_point(score_B, label_B, thresholds.block)
    return FilterQuality(
        rows=len(label_B),
        harmful=int(label_B.sum()),
        auroc=auroc(score_B, label_B),
        auprc=auprc(score_B, label_B),
        recall_at_1_fpr=recall_at_fpr(score_B, label_B, 0.01),
        recall=point.recall,
        fpr=point.fpr,
        threshold=thresholds.block,
    )
