"""The whole HTTP face: the online filter and the finetuning service behind one door."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DataError

from reft_ray.api import chat, files, fine_tuning, models, uploads, webhooks
from reft_ray.api.app import Lifespan, create_app
from reft_ray.api.auth import RateLimitHeaders, authenticator
from reft_ray.api.chat_model import ChatModel
from reft_ray.api.errors import answer, invalid
from reft_ray.api.metrics import process_metrics
from reft_ray.api.moderator import Moderator
from reft_ray.api.settings import FilterSettings
from reft_ray.api.stores import Services
from reft_ray.jobs.figures import Figures
from reft_ray.jobs.uploads import PART_BYTES
from reft_ray.telemetry.recorder import Recorder

FORM_BYTES = 1 << 20
"""Room for what a multipart form adds to its file."""


async def _unstorable(request: Request, error: Exception) -> JSONResponse:
    return answer(invalid("A value holds characters or numbers that cannot be stored."))


def create_service(
    judge: Moderator,
    services: Services,
    model: ChatModel,
    filter_settings: FilterSettings | None = None,
    *,
    screenings_uri: str | None = None,
    recorder: Recorder | None = None,
    lifespan: Lifespan | None = None,
    metrics_token: str | None = None,
) -> FastAPI:
    """The application; `services.database` is closed with it. `/metrics` shows the figures of its job store."""
    exposed = process_metrics()
    Figures(services.jobs).expose(exposed)

    @asynccontextmanager
    async def around(app: FastAPI) -> AsyncIterator[None]:
        try:
            if lifespan is None:
                yield
            else:
                async with lifespan(app):
                    yield
        finally:
            services.database.close()

    app = create_app(
        judge,
        filter_settings,
        screenings_uri=screenings_uri,
        recorder=recorder,
        routers=[
            files.router(services),
            uploads.router(services),
            fine_tuning.router(services),
            models.router(services),
            chat.router(services, model),
            webhooks.router(services),
        ],
        dependencies=[Depends(authenticator(services))],
        body_limits={
            "/v1/files": services.settings.max_file_bytes + FORM_BYTES,
            "/v1/uploads": PART_BYTES + FORM_BYTES,
        },
        lifespan=around,
        exposed=exposed,
        metrics_token=metrics_token,
    )
    app.state.services = services
    for unstorable in (DataError, UnicodeEncodeError):
        app.add_exception_handler(unstorable, _unstorable)
    app.add_middleware(RateLimitHeaders)
    return app
