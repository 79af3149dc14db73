"""The threshold of one dataset, from its own scores (an extension of ours; the method has one threshold for all).

A user's rows are mostly of one kind, so their scores say where that kind ends:

    t = m + 3 * 1.4826 * d          m the median score, d the median distance from it

m does not move with up to half the rows. Poison lies above and widens d: where t is below the operator's threshold, it
is computed again from the distances of the scores below m, and the lower of both counts.

Rows above t that the operator's thresholds would keep go to review. The operator's thresholds are never loosened, and
they alone apply where the scores do not show one kind of rows with outliers (`Fallback`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median

from reft_ray.core.verdict import Thresholds

FLOOR = -0.15
"""A packaged teacher gives rows with this score one chance in a thousand to be harmful."""

_NORMAL = 1.4826
"""The standard deviation of a normal distribution in units of its MAD."""


class Fallback(StrEnum):
    """Why a dataset is judged by the operator's thresholds alone."""

    FEW_ROWS = "few rows"
    WIDE = "scores too wide for a threshold below the operator's"
    NO_SUPPORT = "rows above the dataset's threshold are a kind of their own: the operator's threshold blocks too few"
    MANY = "too large a share above the dataset's threshold"


@dataclass(frozen=True, slots=True)
class JobThreshold:
    """The thresholds to apply; `own` is the dataset's t, None with a `fallback`."""

    thresholds: Thresholds
    own: float | None = None
    fallback: Fallback | None = None


@dataclass(frozen=True, slots=True)
class JobThresholdRule:
    """When a dataset gets a threshold of its own.

    `floor`: t is never lower. `support`: of the rows above t, at least this share must be above the operator's review
    threshold as well. Poison reaches that far up; a second kind of harmless rows does not. `max_share`: the largest
    share of rows above t.
    """

    floor: float = FLOOR
    deviations: float = 3.0
    support: float = 0.1
    max_share: float = 0.4
    min_rows: int = 50

    def apply(self, scores: Sequence[float], operator: Thresholds) -> JobThreshold:
        """The thresholds for a dataset with these scores."""
        if len(scores) < self.min_rows:
            return JobThreshold(operator, fallback=Fallback.FEW_ROWS)
        middle = median(scores)
        distance = median(abs(score - middle) for score in scores)
        if self._threshold(middle, distance) >= operator.review:
            return JobThreshold(operator, fallback=Fallback.WIDE)
        own = self._threshold(middle, min(distance, median(middle - score for score in scores if score <= middle)))
        above = sum(score > own for score in scores)
        if above > self.max_share * len(scores):
            return JobThreshold(operator, fallback=Fallback.MANY)
        if sum(score > operator.review for score in scores) < max(1, self.support * above):
            return JobThreshold(operator, fallback=Fallback.NO_SUPPORT)
        return JobThreshold(Thresholds(review=own, block=operator.block), own)

    def _threshold(self, middle: float, distance: float) -> float:
        return max(self.floor, middle + self.deviations * _NORMAL * distance)
