"""Verdicts and canary results become metrics."""

import pytest

from reft_ray.telemetry import catalog
from reft_ray.telemetry.recorder import MemoryRecorder
from reft_ray.telemetry.verdict_metrics import record_canaries, record_verdicts, unit_score


@pytest.mark.parametrize(("cosine", "score"), [(-1, 0), (0, 0.5), (1, 1), (1.0000001, 1)])
def test_cosines_are_mapped_to_the_unit_interval(cosine, score):
    assert unit_score(cosine) == score


def test_every_row_is_counted_and_observed():
    recorder = MemoryRecorder()
    record_verdicts(
        recorder,
        ["allow", "allow", "block"],
        ["clear", "clear", "refusal_score"],
        [-0.5, 0.0, 0.5],
        stream="dataset",
        policy="filter",
        teacher="t",
    )
    assert recorder.total(catalog.FILTER_ROWS, decision="allow", reason="clear") == 2
    assert recorder.total(catalog.FILTER_ROWS, decision="block", reason="refusal_score", policy="filter") == 1
    assert recorder.observations(catalog.FILTER_SCORE, stream="dataset", teacher="t") == [0.25, 0.5, 0.75]


def test_a_row_without_a_reason_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        record_verdicts(MemoryRecorder(), ["allow"], [], [0.0], stream="chat", policy="online", teacher="t")


def test_canaries_become_recall_and_false_positive_ratio():
    recorder = MemoryRecorder()
    record_canaries(recorder, ["block", "review", "allow", "block"], ["allow", "review"], teacher="t")
    assert recorder.total(catalog.FILTER_CANARY_RECALL, teacher="t") == 0.75
    assert recorder.total(catalog.FILTER_CANARY_FALSE_POSITIVES, teacher="t") == 0.5
    with pytest.raises(ValueError, match="needs harmful and harmless"):
        record_canaries(recorder, [], ["allow"], teacher="t")
