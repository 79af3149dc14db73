"""Drift of refusal scores: the distance of a recent histogram from the teacher's calibration histogram."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from reft_ray.telemetry import catalog, labels
from reft_ray.telemetry.recorder import Recorder

DRIFT_ROWS = 1000
"""Minimum rows per comparison: sampling noise alone raises PSI by about (bins - 1) / rows."""


@dataclass(slots=True)
class ScoreHistogram:
    """Counts of scores in [0, 1] per right-closed bucket; `total` is the sum of the scores."""

    bounds: tuple[float, ...] = labels.SCORE_BUCKETS
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * len(self.bounds)
        if len(self.counts) != len(self.bounds):
            raise ValueError(
                f"a histogram needs one count per bound: {len(self.bounds)} bounds, {len(self.counts)} counts"
            )

    @classmethod
    def of_cosines(cls, counts: Sequence[int]) -> ScoreHistogram:
        """Map equal bins over cosines in [-1, 1] to bins over [0, 1]; `total` is computed from the bin midpoints."""
        bins = len(counts)
        total = sum(count * (place + 0.5) / bins for place, count in enumerate(counts))
        return cls(tuple((place + 1) / bins for place in range(bins)), list(counts), total)

    @property
    def rows(self) -> int:
        """Number of scores."""
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """Exact mean of the scores; NaN without scores."""
        return self.total / self.rows if self.rows else math.nan

    def add(self, scores: Sequence[float]) -> None:
        """Add scores. Raises ValueError for a score outside [0, 1]."""
        for score in scores:
            if not 0.0 <= score <= self.bounds[-1]:
                raise ValueError(f"drift scores must be in [0, {self.bounds[-1]}], got {score}: use unit_score")
            self.counts[bisect_left(self.bounds, score)] += 1
            self.total += score


def population_stability_index(expected: Sequence[float], observed: Sequence[float]) -> float:
    """PSI = sum over bins of (o - e) ln(o / e), where o and e are the fractions of a bin with 0.5 rows added.

    0 for equal fractions; by convention above 0.1 is a moderate and above 0.25 a significant shift. The 0.5 rows keep
    PSI finite for empty bins.
    """
    if len(expected) != len(observed) or not expected:
        raise ValueError(f"PSI compares histograms of equal length, got {len(expected)} and {len(observed)} bins")
    bins = len(expected)
    e_total, o_total = sum(expected) + bins / 2, sum(observed) + bins / 2
    index = 0.0
    for e, o in zip(expected, observed, strict=True):
        e_share, o_share = (e + 0.5) / e_total, (o + 0.5) / o_total
        index += (o_share - e_share) * math.log(o_share / e_share)
    return index


def merge_bins(counts: Sequence[int], edges: Sequence[int]) -> list[int]:
    """Merge counts into the bins [0, edges[0]), [edges[0], edges[1]), ..., [edges[-1], end)."""
    starts = [0, *edges]
    return [sum(counts[low:high]) for low, high in zip(starts, [*edges, len(counts)], strict=True)]


def equal_mass_edges(counts: Sequence[int], bins: int = 10) -> list[int]:
    """Edges of at most `bins` bins with about equal counts."""
    whole, mass = sum(counts), 0
    edges: list[int] = []
    for index, count in enumerate(counts[:-1]):
        mass += count
        if len(edges) < bins - 1 and mass >= whole * (len(edges) + 1) / bins:
            edges.append(index + 1)
    return edges


def record_drift(
    recorder: Recorder, calibration: ScoreHistogram, recent: ScoreHistogram, *, stream: str, teacher: str
) -> None:
    """Set the drift gauges of a stream. Each calibration bin must consist of a whole number of recent bins."""
    finer, rest = divmod(len(recent.counts), len(calibration.counts))
    if rest or not finer:
        raise ValueError(f"{len(recent.counts)} bins do not divide the {len(calibration.counts)} calibration bins")
    edges = equal_mass_edges(calibration.counts)
    psi = population_stability_index(
        merge_bins(calibration.counts, edges), merge_bins(recent.counts, [edge * finer for edge in edges])
    )
    recorder.set(catalog.FILTER_SCORE_PSI, psi, stream=stream, teacher=teacher)
    shift = recent.mean - calibration.mean
    recorder.set(catalog.FILTER_SCORE_MEAN_SHIFT, shift, stream=stream, teacher=teacher)


class DriftMonitor:
    """Compares a stream of scores with the teacher's calibration scores and sets the gauges once per `window` rows."""

    def __init__(
        self, calibration: ScoreHistogram, recorder: Recorder, *, stream: str, teacher: str, window: int = DRIFT_ROWS
    ) -> None:
        if not calibration.rows:
            raise ValueError(f"teacher {teacher} has an empty calibration histogram: cannot measure drift")
        self._calibration = calibration
        self._recorder = recorder
        self._labels = {"stream": stream, "teacher": teacher}
        self._window = window
        self._recent = ScoreHistogram(calibration.bounds)

    def add(self, scores: Sequence[float]) -> None:
        """Add recent scores in [0, 1], see `unit_score`."""
        self._recent.add(scores)
        if self._recent.rows >= self._window:
            record_drift(self._recorder, self._calibration, self._recent, **self._labels)
            self._recent = ScoreHistogram(self._calibration.bounds)

    def close(self) -> None:
        """Remove the gauges, for a teacher that is no longer served."""
        for metric in (catalog.FILTER_SCORE_PSI, catalog.FILTER_SCORE_MEAN_SHIFT):
            self._recorder.set(metric, None, **self._labels)
