"""Optional OpenTelemetry traces with gen_ai attributes; disabled without a tracer provider.

Spans contain ids, counts and scores, never text.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

logger = logging.getLogger(__name__)

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
Attribute = str | int | float | bool


class Span:
    """An open span, or a no-op without a tracer."""

    def __init__(self, span: Any = None) -> None:
        self._span = span

    def set_attributes(self, **attributes: Attribute) -> None:
        """Set attributes with the prefix `reft.`."""
        if self._span is not None:
            self._span.set_attributes({f"reft.{name}": value for name, value in attributes.items()})

    def add_verdict(self, score: float, decision: str) -> None:
        """Add an event `gen_ai.evaluation.result` (OpenTelemetry gen_ai conventions)."""
        if self._span is not None:
            self._span.add_event(
                "gen_ai.evaluation.result",
                {
                    "gen_ai.evaluation.name": "refusal_score",
                    "gen_ai.evaluation.score.value": score,
                    "gen_ai.evaluation.score.label": decision,
                },
            )


class Tracer:
    """Opens spans with the provider's tracer; without a provider the spans are no-ops."""

    def __init__(self, provider: TracerProvider | None = None) -> None:
        self._tracer = provider.get_tracer("reft_ray") if provider is not None else None

    @contextmanager
    def span(self, operation: str, model: str, **attributes: Attribute) -> Iterator[Span]:
        """Open a span for an operation on a model, e.g. `moderation`; an exception sets `error.type`."""
        if self._tracer is None:
            yield Span()
            return
        from opentelemetry.trace import Status, StatusCode

        names = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "reft_ray",
            "gen_ai.request.model": model,
        }
        # OpenTelemetry would record exception messages, which may quote rows.
        with self._tracer.start_as_current_span(
            f"{operation} {model}", attributes=names, record_exception=False, set_status_on_exception=False
        ) as span:
            handle = Span(span)
            handle.set_attributes(**attributes)
            try:
                yield handle
            except BaseException as error:
                span.set_attribute("error.type", type(error).__name__)
                span.set_status(Status(StatusCode.ERROR))
                raise


def current_ids() -> dict[str, str]:
    """`trace_id` and `span_id` of the open span in hexadecimal; nothing outside of spans."""
    api = sys.modules.get("opentelemetry.trace")
    context = api.get_current_span().get_span_context() if api is not None else None
    if context is None or not context.is_valid:
        return {}
    return {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}


def tracer_from_environment() -> Tracer:
    """A tracer that exports to OTEL_EXPORTER_OTLP_ENDPOINT; a no-op tracer if that is not set.

    Also without the extra `otel`, after a warning: the filter must not stop for want of traces.
    """
    if not os.environ.get(ENDPOINT):
        return Tracer()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        logger.warning(
            "%s is set, but the extra is missing, so nothing is traced: pip install 'reft-ray[otel]'", ENDPOINT
        )
        return Tracer()
    provider = TracerProvider(resource=Resource.create({"service.name": "reft-ray"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracer(provider)
