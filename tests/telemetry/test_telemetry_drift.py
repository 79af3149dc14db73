"""Drift measures against naive computations and known cases."""

import itertools
import math
import random

import pytest

from reft_ray.telemetry import catalog
from reft_ray.telemetry.drift import (
    DriftMonitor,
    ScoreHistogram,
    equal_mass_edges,
    merge_bins,
    population_stability_index,
    record_drift,
)
from reft_ray.telemetry.recorder import MemoryRecorder


def histogram(scores: list[float]) -> ScoreHistogram:
    made = ScoreHistogram()
    made.add(scores)
    return made


def beta(seed: int, a: float, b: float, rows: int) -> list[float]:
    rng = random.Random(seed)
    return [rng.betavariate(a, b) for _ in range(rows)]


def test_counts_equal_a_naive_count():
    scores = [0.0, 1.0, 0.025, 0.0251, *beta(0, 2, 5, 500)]
    made = histogram(scores)
    bounds = (-math.inf, *made.bounds)
    naive = [sum(low < s <= high for s in scores) for low, high in itertools.pairwise(bounds)]
    assert made.counts == naive
    assert made.rows == len(scores)
    assert made.mean == pytest.approx(sum(scores) / len(scores))


@pytest.mark.parametrize("score", [-0.01, 1.01, math.nan])
def test_scores_outside_the_unit_interval_are_refused(score):
    with pytest.raises(ValueError, match="unit_score"):
        ScoreHistogram().add([score])


def test_psi_equals_its_formula_for_large_counts():
    expected, observed = [50_000, 30_000, 20_000], [20_000, 30_000, 50_000]
    naive = sum((o - e) * math.log(o / e) for e, o in zip((0.5, 0.3, 0.2), (0.2, 0.3, 0.5), strict=True))
    assert population_stability_index(expected, observed) == pytest.approx(naive, rel=1e-4)
    assert population_stability_index(expected, observed) == pytest.approx(
        population_stability_index(observed, expected)
    )


def test_psi_is_zero_without_drift_and_finite_with_empty_bins():
    assert population_stability_index([3, 0, 7], [3, 0, 7]) == 0
    assert 1 < population_stability_index([100, 0], [0, 100]) < math.inf


def test_psi_of_the_same_distribution_is_small():
    calibration = histogram(beta(1, 2, 5, 20_000))
    edges = equal_mass_edges(calibration.counts)
    indices = [
        population_stability_index(
            merge_bins(calibration.counts, edges), merge_bins(histogram(beta(seed, 2, 5, 1000)).counts, edges)
        )
        for seed in range(2, 12)
    ]
    assert max(indices) < 0.05


@pytest.mark.parametrize(("expected", "observed"), [([], []), ([1], [1, 2])])
def test_psi_refuses_histograms_of_different_length(expected, observed):
    with pytest.raises(ValueError, match="equal length"):
        population_stability_index(expected, observed)


def test_equal_mass_bins_partition_the_counts():
    counts = histogram(beta(3, 2, 5, 5000)).counts
    edges = equal_mass_edges(counts, 10)
    merged = merge_bins(counts, edges)
    assert sum(merged) == 5000
    assert len(merged) == 10
    assert max(merged) < 2 * 5000 / 10
    assert merge_bins([5, 0, 0], equal_mass_edges([5, 0, 0])) == [5, 0, 0]


def test_monitor_reports_full_windows_and_detects_a_shift():
    recorder = MemoryRecorder()
    monitor = DriftMonitor(histogram(beta(4, 2, 5, 10_000)), recorder, stream="screening", teacher="t", window=500)
    monitor.add(beta(5, 2, 5, 499))
    assert recorder.series(catalog.FILTER_SCORE_PSI) == []
    monitor.add(beta(6, 2, 5, 1))
    assert recorder.total(catalog.FILTER_SCORE_PSI, stream="screening", teacher="t") < 0.1
    assert abs(recorder.total(catalog.FILTER_SCORE_MEAN_SHIFT)) < 0.03
    monitor.add(beta(7, 4, 3, 500))
    assert recorder.total(catalog.FILTER_SCORE_PSI) > 0.25
    assert recorder.total(catalog.FILTER_SCORE_MEAN_SHIFT) == pytest.approx(4 / 7 - 2 / 7, abs=0.03)
    monitor.close()
    assert recorder.series(catalog.FILTER_SCORE_PSI) == recorder.series(catalog.FILTER_SCORE_MEAN_SHIFT) == []


def test_monitor_refuses_an_empty_calibration():
    with pytest.raises(ValueError, match="empty calibration"):
        DriftMonitor(ScoreHistogram(), MemoryRecorder(), stream="chat", teacher="t")


def test_bins_that_do_not_divide_the_calibration_are_refused():
    calibration, recent = ScoreHistogram.of_cosines([1] * 20), ScoreHistogram.of_cosines([1] * 30)
    with pytest.raises(ValueError, match="30 bins do not divide the 20"):
        record_drift(MemoryRecorder(), calibration, recent, stream="dataset", teacher="t")
