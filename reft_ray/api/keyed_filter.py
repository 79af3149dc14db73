"""The online filter with API keys, scopes and limits, without the finetuning service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from reft_ray.api.auth import Authenticator, FilterKeys, RateLimitHeaders
from reft_ray.api.errors import response_of, unavailable
from reft_ray.api.filter_app import create_filter_app
from reft_ray.api.moderator import Moderator
from reft_ray.api.settings import FilterSettings
from reft_ray.jobs.database import UNREACHABLE, Database
from reft_ray.telemetry.recorder import NullRecorder, Recorder


def create_keyed_filter(
    moderator: Moderator,
    database: Database,
    settings: FilterSettings | None = None,
    *,
    screenings_uri: str | None = None,
    recorder: Recorder | None = None,
    metrics_token: str | None = None,
) -> FastAPI:
    """`create_filter_app` whose callers need a key of `reft-ray keys`; it closes the database at its end."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        database.close()

    app = create_filter_app(
        moderator,
        settings,
        screenings_uri=screenings_uri,
        recorder=recorder,
        gate=Authenticator(FilterKeys.of(database), recorder or NullRecorder()),
        ready=database.check,
        lifespan=lifespan,
        metrics_token=metrics_token,
    )
    with_keys(app)
    return app


def with_keys(app: FastAPI) -> None:
    """Add the headers of rate limits, and the answer where the records of keys cannot be reached."""
    for kind in UNREACHABLE:
        app.add_exception_handler(kind, _unreachable)
    app.add_middleware(RateLimitHeaders)


async def _unreachable(request: Request, error: Exception) -> JSONResponse:
    return response_of(unavailable())
