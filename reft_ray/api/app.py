"""The HTTP application: the online filter, and whatever else the caller includes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import APIRouter, FastAPI
from fastapi.params import Depends

from reft_ray.api import document, errors, health, metrics, moderations, screenings, streaming, teacher
from reft_ray.api.context import Filter
from reft_ray.api.middleware import PREFIX, UNLIMITED, Edge
from reft_ray.api.moderator import Moderator
from reft_ray.api.screening_store import ScreeningStore
from reft_ray.api.settings import FilterSettings
from reft_ray.telemetry.recorder import NullRecorder, PrometheusRecorder, Recorder

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def create_app(
    judge: Moderator,
    settings: FilterSettings | None = None,
    *,
    screenings_uri: str | None = None,
    recorder: Recorder | None = None,
    routers: Sequence[APIRouter] = (),
    dependencies: Sequence[Depends] = (),
    body_limits: Mapping[str, int] | None = None,
    lifespan: Lifespan | None = None,
    exposed: PrometheusRecorder | None = None,
    metrics_token: str | None = None,
) -> FastAPI:
    """The filter's endpoints under `/v1`, with further ones beside them.

    - `screenings_uri`: a directory or `pyarrow.fs` URI that all gateway replicas reach; without one the resumable
      screening resource answers 501 and the streaming one works alone.
    - `routers`: included under `/v1`, so they declare paths such as `/files`; they raise `api.errors.ApiError` or the
      errors of `jobs.errors`, which become OpenAI's envelope here, as does FastAPI's own validation (400, never 422).
    - `dependencies`: run before every `/v1` route, for authentication; they may set `request.state.project`, the
      owner of screening resources. `/healthz`, `/readyz`, `/metrics` and the documentation stay open.
    - `body_limits`: bytes by path prefix, e.g. `{"/v1/files": 512 << 20}`; `edge.UNLIMITED` (-1) for routes that
      bound their own bodies. Paths without an entry take `settings.max_body_bytes`.
    - `lifespan`: runs around the application, e.g. to close stores.
    - `exposed`: what `/metrics` shows, with figures of stores where they are followed; `metrics_token`: the bearer
      token that it asks for.

    Handlers find `request.state.request_id`, `request.app.state.judge` and `request.app.state.recorder`. The work of
    a handler that blocks belongs in a plain `def` route or in `asyncio.to_thread`.
    """
    settings = settings or FilterSettings()
    recorder = recorder or NullRecorder()
    guard = Filter(judge, settings, recorder)
    store = ScreeningStore(screenings_uri, settings) if screenings_uri else None

    @asynccontextmanager
    async def around(app: FastAPI) -> AsyncIterator[None]:
        if lifespan is None:
            yield
        else:
            async with lifespan(app):
                yield

    app = FastAPI(
        title="reft-ray",
        summary="Moderation, dataset screening and finetuning behind a Ref-Teacher.",
        lifespan=around,
        # A path with a slash too many is a mistake to report, not a redirect that loses a streamed body.
        redirect_slashes=False,
    )
    app.state.judge = judge
    app.state.recorder = recorder
    errors.install(app)
    document.install(app)
    limits = {
        "": settings.max_body_bytes,
        # The dataset itself is bounded as it streams, with an answer that names the other way.
        "/v1/screenings": UNLIMITED,
        "/v1/screenings/": max(settings.max_body_bytes, 2 * settings.max_chunk_bytes),
        **(body_limits or {}),
    }
    app.add_middleware(Edge, recorder=recorder, limits=limits)
    app.include_router(health.router(judge))
    app.include_router(metrics.router(exposed or metrics.process_metrics(), metrics_token))
    ours = [
        moderations.router(guard),
        streaming.router(guard),
        screenings.router(guard, store),
        teacher.router(guard),
    ]
    for router in (*ours, *routers):
        app.include_router(router, prefix=PREFIX, dependencies=list(dependencies))
    return app
