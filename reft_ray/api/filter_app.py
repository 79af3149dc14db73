"""The online filter as a FastAPI application. `service_app` adds the finetuning service to it."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi

from reft_ray.api import errors, metrics, moderations, screening_stream, screenings
from reft_ray.api.admission import Admission, Gate
from reft_ray.api.context import FilterContext
from reft_ray.api.docs_page import install_docs
from reft_ray.api.errors import busy, unavailable
from reft_ray.api.limits import Limits, LimitTable, filter_limits
from reft_ray.api.middleware import PREFIX, RequestMiddleware
from reft_ray.api.moderator import Moderator, ModeratorError, OverloadedError
from reft_ray.api.screening_store import ScreeningStore
from reft_ray.api.settings import FilterSettings
from reft_ray.core.conversation import chat
from reft_ray.telemetry.recorder import NullRecorder, PrometheusRecorder, Recorder

READY_SECONDS = 5.0

_TEXT_OR_NULL = {"anyOf": [{"type": "string"}, {"type": "null"}]}
_ERROR = {
    "title": "Error",
    "description": "OpenAI's error envelope; there may be further keys.",
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _TEXT_OR_NULL,
                "code": _TEXT_OR_NULL,
            },
        }
    },
}
_ERROR_RESPONSE = {
    "description": "An error; see `code`. 429 and 503 carry `retry-after`.",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
}


def create_filter_app(
    moderator: Moderator,
    settings: FilterSettings | None = None,
    *,
    screenings_uri: str | None = None,
    recorder: Recorder | None = None,
    routers: Sequence[APIRouter] = (),
    gate: Gate | None = None,
    limits: Limits | None = None,
    ready: Callable[[], None] = lambda: None,
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None = None,
    exposed: PrometheusRecorder | None = None,
    metrics_token: str | None = None,
) -> FastAPI:
    """The filter's endpoints under `/v1`, and those of `routers`.

    - `screenings_uri`: a directory or `pyarrow.fs` URI that all gateway replicas can reach; without it resumable
      screenings answer 501 and only the one-request screening works.
    - `routers`: included under `/v1`, so their paths are such as `/files`. Their `api.errors.ApiError` and `ReftError`
      become OpenAI's error envelope, as does FastAPI's own validation (400, never 422).
    - `gate`: admits the callers of every `/v1` route before their bodies are read. `/healthz`, `/readyz`, `/metrics`
      and the documentation need no key.
    - `limits`: the limits of the bodies of `routers`, by route.
    - `ready`: raises where the service cannot work, for `/readyz`; it may block.
    - `exposed`: the metrics of `/metrics`; `metrics_token`: the bearer token that it requires.

    Handlers use `request.state.request_id`, `request.app.state.moderator` and `request.app.state.recorder`. Blocking
    work belongs in a plain `def` route or in `asyncio.to_thread`.
    """
    settings = settings or FilterSettings()
    recorder = recorder or NullRecorder()
    context = FilterContext(moderator, settings, recorder)
    store = ScreeningStore(screenings_uri, settings) if screenings_uri else None
    app = FastAPI(
        title="reft-ray",
        summary="Moderation, dataset screening and finetuning guided by a Ref-Teacher.",
        lifespan=lifespan,
        # A path with an extra slash is an error, not a redirect: a redirect loses a streamed body.
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
    )
    app.state.moderator = moderator
    app.state.recorder = recorder
    errors.install(app)
    _describe_errors(app)
    install_docs(app)
    table = LimitTable({**filter_limits(settings), **(limits or {})}.items())
    app.add_middleware(Admission, settings=settings, table=table, gate=gate)
    app.add_middleware(RequestMiddleware, recorder=recorder)
    app.include_router(_health(moderator, ready))
    app.include_router(metrics.router(exposed or metrics.process_metrics(), metrics_token))
    filter_routers = (moderations.router(context), screening_stream.router(context), screenings.router(context, store))
    for router in (*filter_routers, *routers):
        app.include_router(router, prefix=PREFIX)
    return app


def freeze_startup() -> None:
    """Exempt all that exists now from garbage collection: a full one stops every request for a tenth of a second.

    For a process that only serves, once its application is made.
    """
    gc.collect()
    gc.freeze()


def _health(moderator: Moderator, ready: Callable[[], None]) -> APIRouter:
    """`/healthz`: the process answers. `/readyz`: the teacher and the records answer. Neither needs a key."""
    routes = APIRouter(tags=["health"])

    @routes.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Liveness."""
        return {"status": "ok"}

    @routes.get("/readyz")
    async def readyz() -> dict[str, str]:
        """Readiness: the records answer and a teacher has just judged a prompt; 503 otherwise."""
        try:
            async with asyncio.timeout(READY_SECONDS):
                await asyncio.to_thread(ready)
        except Exception:
            raise unavailable() from None
        try:
            batch = await moderator.judge([chat("Good morning.")], None, time.monotonic() + READY_SECONDS)
        except OverloadedError:
            # The teacher is busy, not broken: taking the replica out of rotation would make it worse.
            return {"status": "busy"}
        except ModeratorError:
            raise busy("No teacher answers.", 2, status=503) from None
        return {"status": "ok", "teacher": batch.teacher}

    return routes


def _describe_errors(app: FastAPI) -> None:
    """Describe errors in the OpenAPI document as `api.errors` sends them, without FastAPI's 422."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
            schemas = found.setdefault("components", {}).setdefault("schemas", {})
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            schemas["Error"] = _ERROR
            for path in found["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
                    operation["responses"] |= {"4XX": _ERROR_RESPONSE, "5XX": _ERROR_RESPONSE}
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
