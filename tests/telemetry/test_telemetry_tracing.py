"""Traces follow the gen_ai conventions, contain no text, and are disabled by default."""

import json
import logging
import sys

import pytest

from reft_ray.telemetry.logs import JsonFormatter
from reft_ray.telemetry.tracing import ENDPOINT, Tracer, tracer_from_environment

sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="opentelemetry-sdk is not installed")


@pytest.fixture
def traced():
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield Tracer(provider), exporter.get_finished_spans
    provider.shutdown()


def test_a_span_has_operation_model_and_verdicts(traced):
    tracer, finished = traced
    with tracer.span("moderation", "rt-1", stream="chat") as span:
        span.set_attributes(rows=2)
        span.add_verdict(0.75, "block")
    (done,) = finished()
    assert done.name == "moderation rt-1"
    assert dict(done.attributes) == {
        "gen_ai.operation.name": "moderation",
        "gen_ai.provider.name": "reft_ray",
        "gen_ai.request.model": "rt-1",
        "reft.stream": "chat",
        "reft.rows": 2,
    }
    (event,) = done.events
    assert event.name == "gen_ai.evaluation.result"
    assert event.attributes["gen_ai.evaluation.score.label"] == "block"


def test_errors_set_only_their_type_on_the_span(traced):
    tracer, finished = traced
    with pytest.raises(ValueError, match="secret"), tracer.span("moderation", "rt-1"):
        raise ValueError("secret row")
    (done,) = finished()
    assert done.attributes["error.type"] == "ValueError"
    assert not done.status.is_ok
    assert "secret" not in done.to_json()


def test_without_a_provider_spans_are_no_ops():
    with Tracer().span("moderation", "rt-1", stream="chat") as span:
        assert span._span is None
        span.set_attributes(rows=2)
        span.add_verdict(0.5, "allow")


def test_without_an_endpoint_nothing_is_exported(monkeypatch):
    monkeypatch.delenv(ENDPOINT, raising=False)
    assert tracer_from_environment()._tracer is None


def test_an_endpoint_without_the_extra_is_a_warning(monkeypatch, caplog):
    """A teacher must not stop for want of traces."""
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:4318")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    monkeypatch.setattr(logging.getLogger("reft_ray"), "propagate", True)
    assert tracer_from_environment()._tracer is None
    assert "reft-ray[otel]" in caplog.text


def test_logs_within_a_span_name_it(traced):
    tracer, finished = traced
    record = logging.LogRecord("reft_ray.x", logging.INFO, "x.py", 1, "said", (), None)
    with tracer.span("moderation", "rt-1"):
        inside = json.loads(JsonFormatter().format(record))
    outside = json.loads(JsonFormatter().format(record))
    (done,) = finished()
    assert inside["trace_id"] == f"{done.context.trace_id:032x}"
    assert inside["span_id"] == f"{done.context.span_id:016x}"
    assert "trace_id" not in outside
