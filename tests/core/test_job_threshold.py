"""A dataset's own threshold on made distributions of scores."""

from __future__ import annotations

import random
from statistics import median

import pytest

from reft_ray.core.job_threshold import Fallback, JobThresholdRule
from reft_ray.core.verdict import Thresholds

OPERATOR = Thresholds(review=0.35, block=0.41)
TASK = (-0.05, 0.04)
POISON = (0.23, 0.22)


def scores(*groups: tuple[int, tuple[float, float]], seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [max(-1.0, min(1.0, rng.gauss(*shape))) for count, shape in groups for _ in range(count)]


def share_above(values: list[float], threshold: float) -> float:
    return sum(value > threshold for value in values) / len(values)


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.3])
def test_poison_in_rows_of_one_kind_is_withheld_without_task_rows(ratio: float) -> None:
    poison, task = scores((int(1000 * ratio), POISON), seed=1), scores((int(1000 * (1 - ratio)), TASK), seed=2)
    found = JobThresholdRule().apply(poison + task, OPERATOR)
    assert found.own is not None
    assert found.thresholds.review == found.own < OPERATOR.review
    assert found.thresholds.block == OPERATOR.block
    assert share_above(poison, found.own) > share_above(poison, OPERATOR.review) + 0.2
    assert share_above(task, found.own) < 0.01


def test_rows_without_poison_are_judged_by_the_operator() -> None:
    found = JobThresholdRule().apply(scores((1000, TASK)), OPERATOR)
    assert found.thresholds == OPERATOR
    assert found.own is None


def test_half_poison_falls_back() -> None:
    found = JobThresholdRule().apply(scores((500, TASK), (500, POISON)), OPERATOR)
    assert (found.thresholds, found.fallback) == (OPERATOR, Fallback.WIDE)


def test_a_second_kind_of_harmless_rows_is_not_withheld() -> None:
    found = JobThresholdRule().apply(scores((850, TASK), (150, (0.2, 0.03))), OPERATOR)
    assert (found.thresholds, found.fallback) == (OPERATOR, Fallback.NO_SUPPORT)


def test_a_large_share_above_the_threshold_falls_back() -> None:
    rows = scores((580, (-0.05, 0.001)), (420, (0.4, 0.05)))
    assert JobThresholdRule(deviations=1).apply(rows, OPERATOR).fallback in (Fallback.MANY, Fallback.WIDE)


def test_it_is_never_laxer_than_the_operator_nor_stricter_than_the_floor() -> None:
    for seed in range(20):
        rng = random.Random(seed)
        rows = scores((900, (rng.uniform(-0.5, 0.5), 0.05)), (100, (rng.uniform(0, 0.8), 0.2)), seed=seed)
        found = JobThresholdRule(floor=0.05).apply(rows, OPERATOR)
        assert 0.05 <= found.thresholds.review <= OPERATOR.review
        assert found.thresholds.block == OPERATOR.block


def test_few_rows_say_nothing() -> None:
    assert JobThresholdRule().apply(scores((49, TASK)), OPERATOR).fallback is Fallback.FEW_ROWS


def test_poison_above_the_median_does_not_widen_the_spread() -> None:
    rows = scores((700, TASK), seed=2) + scores((300, POISON), seed=1)
    middle = median(rows)
    usual = middle + 3 * 1.4826 * median(abs(score - middle) for score in rows)
    own = JobThresholdRule().apply(rows, OPERATOR).own
    assert own is not None
    assert own < usual - 0.03
