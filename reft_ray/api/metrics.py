"""`GET /metrics`: metrics of this process and its stores in Prometheus' text format, without row texts or ids."""

from __future__ import annotations

import asyncio
import hmac
import platform
from importlib.metadata import version
from typing import Annotated

from fastapi import APIRouter, Header
from starlette.responses import Response

from reft_ray.api.errors import ApiError
from reft_ray.telemetry import catalog
from reft_ray.telemetry.recorder import PrometheusRecorder

TEXT = "text/plain; version=0.0.4; charset=utf-8"


def process_metrics() -> PrometheusRecorder:
    """A new recorder with the build information."""
    metrics = PrometheusRecorder()
    metrics.set(catalog.BUILD_INFO, 1, version=version("reft-ray"), python=platform.python_version())
    return metrics


def router(metrics: PrometheusRecorder, token: str | None) -> APIRouter:
    """The route; with a `token`, it requires that bearer token."""
    routes = APIRouter(tags=["health"])

    @routes.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def exposition(authorization: Annotated[str, Header()] = "") -> Response:
        """The metrics."""
        if token is not None and not hmac.compare_digest(authorization.encode(), f"Bearer {token}".encode()):
            raise ApiError(401, "Metrics require their bearer token.", code="invalid_api_key")
        # In a thread: the metrics of the stores are read from the database now.
        return Response(await asyncio.to_thread(metrics.exposition), media_type=TEXT)

    return routes
