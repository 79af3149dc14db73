"""Contract tests for all recorders that work without a cluster."""

import math
from collections.abc import Iterator
from threading import Event

import pytest
from prometheus_client.parser import text_string_to_metric_families

from reft_ray.telemetry import catalog
from reft_ray.telemetry.metric_types import Labeller
from reft_ray.telemetry.ray_recorder import RayRecorder
from reft_ray.telemetry.recorder import MemoryRecorder, NullRecorder, PrometheusRecorder, Recorder

ROW = {"decision": "allow", "reason": "clear", "policy": "online", "stream": "chat", "teacher": "t-1"}


@pytest.fixture(params=[NullRecorder, MemoryRecorder, PrometheusRecorder, RayRecorder])
def recorder(request) -> Iterator[Recorder]:
    recorder = request.param()
    yield recorder
    if isinstance(recorder, RayRecorder):
        recorder.close()


def samples(recorder: PrometheusRecorder) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(recorder.exposition().decode())
        for sample in family.samples
    }


def test_every_recorder_is_a_recorder(recorder):
    assert isinstance(recorder, Recorder)


def test_accepts_each_kind(recorder):
    recorder.count(catalog.FILTER_ROWS, 2, **ROW)
    recorder.count(catalog.FILTER_RETRIES, 0)
    recorder.observe(catalog.FILTER_QUEUE_SECONDS, 0.1)
    recorder.set(catalog.FILTER_QUEUE_DEPTH, -1.5)
    recorder.set(catalog.FILTER_QUEUE_DEPTH, None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: r.count(catalog.FILTER_QUEUE_DEPTH), "is a gauge"),
        (lambda r: r.set(catalog.FILTER_RETRIES, 1), "is a counter"),
        (lambda r: r.observe(catalog.FILTER_RETRIES, 1), "is a counter"),
        (lambda r: r.count(catalog.FILTER_TRUNCATIONS), r"takes the labels \['stream'\], got \[\]"),
        (lambda r: r.count(catalog.FILTER_RETRIES, user="x"), r"got \['user'\]"),
        (lambda r: r.count(catalog.FILTER_RETRIES, -1), "not negative"),
        (lambda r: r.count(catalog.FILTER_RETRIES, math.nan), "not negative"),
        (lambda r: r.observe(catalog.FILTER_QUEUE_SECONDS, math.nan), "must be finite"),
    ],
)
def test_refuses_invalid_values_and_labels(recorder, call, message):
    with pytest.raises(ValueError, match=message):
        call(recorder)


def test_memory_recorder_returns_what_was_recorded():
    recorder = MemoryRecorder()
    recorder.count(catalog.FILTER_ROWS, 2, **ROW)
    recorder.count(catalog.FILTER_ROWS, 3, **{**ROW, "decision": "block"})
    recorder.observe(catalog.FILTER_SCORE, 0.25, stream="chat", teacher="t-1")
    recorder.set(catalog.JOBS, 4, status="running", project="acme")
    assert recorder.total(catalog.FILTER_ROWS) == 5
    assert recorder.total(catalog.FILTER_ROWS, decision="block", application="reft") == 3
    assert recorder.observations(catalog.FILTER_SCORE, stream="chat") == [0.25]
    assert recorder.observations(catalog.FILTER_SCORE, stream="dataset") == []
    assert recorder.series(catalog.JOBS) == [({"application": "reft", "status": "running", "project": "acme"}, 4)]
    with pytest.raises(ValueError, match="has no label"):
        recorder.total(catalog.JOBS, state="running")


def test_prometheus_recorder_exposes_what_was_recorded():
    recorder = PrometheusRecorder(Labeller("filter"))
    recorder.count(catalog.FILTER_TRUNCATIONS, 2, stream="chat")
    recorder.count(catalog.FILTER_TRUNCATIONS, 1, stream="chat")
    recorder.observe(catalog.FILTER_QUEUE_SECONDS, 0.02)
    found = samples(recorder)
    labels = (("application", "filter"), ("stream", "chat"))
    assert found[catalog.FILTER_TRUNCATIONS.name, labels] == 3
    assert found[catalog.FILTER_QUEUE_SECONDS.name + "_sum", labels[:1]] == pytest.approx(0.02)
    assert not any(name.endswith("_created") for name, _ in found)


TEACHER = {"layer": "4", "review_threshold": "0.1", "block_threshold": "0.3"}


def test_info_metrics_have_one_series_and_gauges_can_be_removed():
    memory, prometheus = MemoryRecorder(), PrometheusRecorder()
    for recorder in (memory, prometheus):
        for teacher in ("old", "new"):
            recorder.set(catalog.TEACHER_INFO, 1, teacher=teacher, **TEACHER)
            recorder.set(catalog.FILTER_CANARY_RECALL, 1, teacher=teacher)
        recorder.set(catalog.FILTER_CANARY_RECALL, None, teacher="old")
        recorder.set(catalog.FILTER_CANARY_RECALL, None, teacher="never set")
    for metric in (catalog.TEACHER_INFO, catalog.FILTER_CANARY_RECALL):
        assert [labels["teacher"] for labels, _ in memory.series(metric)] == ["new"]
        assert [dict(labels)["teacher"] for name, labels in samples(prometheus) if name == metric.name] == ["new"]


def test_ray_recorder_refreshes_only_current_gauges(monkeypatch):
    calls: list[tuple[float, dict[str, str]]] = []
    refreshed = Event()

    def set_gauge(self, value, tags):
        calls.append((value, tags))
        if len(calls) >= 6:
            refreshed.set()

    monkeypatch.setattr("ray.util.metrics.Gauge.set", set_gauge)
    recorder = RayRecorder(refresh_seconds=0.01)
    try:
        for teacher in ("old", "new"):
            recorder.set(catalog.TEACHER_INFO, 1, teacher=teacher, **TEACHER)
        recorder.set(catalog.FILTER_QUEUE_DEPTH, 3)
        recorder.set(catalog.FILTER_QUEUE_DEPTH, None)
        start = len(calls)
        assert refreshed.wait(10)
    finally:
        recorder.close()
    assert {tags.get("teacher") for _, tags in calls[start:]} == {"new"}


def test_values_out_of_bounds_become_other():
    recorder = MemoryRecorder()
    recorder.count(catalog.FILTER_ERRORS, error_type="cosmic ray")
    for index in range(1000):
        recorder.count(catalog.SCREENING_INVALID, code=f"code-{index}")
    assert recorder.total(catalog.FILTER_ERRORS, error_type="other") == 1
    (code,) = catalog.SCREENING_INVALID.labels
    assert len(recorder.series(catalog.SCREENING_INVALID)) == code.bound
    assert recorder.total(catalog.SCREENING_INVALID, code="other") == 1000 - code.limit


def test_projects_are_recorded_only_if_enabled():
    hidden, shown = MemoryRecorder(Labeller()), MemoryRecorder(Labeller(projects=True))
    for recorder in (hidden, shown):
        recorder.count(catalog.SCREENING_BYTES, 10, project="acme")
    assert [labels["project"] for labels, _ in hidden.series(catalog.SCREENING_BYTES)] == ["all"]
    assert [labels["project"] for labels, _ in shown.series(catalog.SCREENING_BYTES)] == ["acme"]


def test_callbacks_are_called_at_each_scrape():
    recorder = PrometheusRecorder()
    store = {"queued": 2, "running": 1}
    recorder.add_callback(
        catalog.JOBS, lambda: [({"status": s, "project": p}, n) for s, n in store.items() for p in "ab"]
    )
    key = (catalog.JOBS.name, (("application", "reft"), ("project", "all"), ("status", "queued")))
    assert samples(recorder)[key] == 4
    store["queued"] = 5
    assert samples(recorder)[key] == 10


def test_a_failing_callback_leaves_out_only_its_metric(caplog):
    def broken():
        raise OSError("store is down")

    recorder = PrometheusRecorder()
    recorder.add_callback(catalog.JOBS, broken)
    recorder.count(catalog.FILTER_RETRIES)
    found = samples(recorder)
    assert {name for name, _ in found} == {catalog.FILTER_RETRIES.name}
    assert "could not read metric" in caplog.text


def test_histograms_have_no_callbacks():
    with pytest.raises(ValueError, match="counters and gauges only"):
        PrometheusRecorder().add_callback(catalog.FILTER_SCORE, list)
