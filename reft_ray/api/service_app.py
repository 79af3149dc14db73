"""The finetuning service as a FastAPI application: the online filter, files, jobs, models, chat and webhooks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DataError

from reft_ray.api import (
    appeals,
    audit,
    chat,
    completions,
    erasures,
    files,
    fine_tuning,
    models,
    reviews,
    training,
    training_weights,
    uploads,
    webhooks,
)
from reft_ray.api.auth import Authenticator
from reft_ray.api.chat_model import ChatModel
from reft_ray.api.errors import invalid, response_of
from reft_ray.api.filter_app import create_filter_app
from reft_ray.api.keyed_filter import with_keys
from reft_ray.api.limits import service_limits
from reft_ray.api.metrics import process_metrics
from reft_ray.api.moderator import Moderator
from reft_ray.api.settings import FilterSettings
from reft_ray.api.stores import Stores
from reft_ray.jobs.figures import Figures
from reft_ray.jobs.housekeeping import Housekeeping
from reft_ray.jobs.launcher import Launcher
from reft_ray.jobs.lease import Leases, Slots
from reft_ray.jobs.reconciler import Reconciler
from reft_ray.telemetry.recorder import NullRecorder, Recorder


def create_service_app(
    moderator: Moderator,
    stores: Stores,
    model: ChatModel,
    filter_settings: FilterSettings | None = None,
    *,
    launcher: Launcher | None = None,
    slots: Slots | None = None,
    screenings_uri: str | None = None,
    recorder: Recorder | None = None,
    metrics_token: str | None = None,
) -> FastAPI:
    """The application; it closes `stores.database` at its end. `/metrics` includes the metrics of the job store.

    With a `launcher`, the application also reconciles jobs and cleans up while it runs. Every gateway may: all their
    writes are compare-and-set.
    """
    filter_settings = filter_settings or FilterSettings()
    exposed = process_metrics()
    Figures(stores.jobs, stores.heads).expose(exposed)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with ExitStack() as stack:
            stack.callback(stores.database.close)
            if launcher is not None:
                reconciler = Reconciler(stores.jobs, Leases(stores.jobs), launcher, slots or Slots())
                stack.enter_context(reconciler.background())
                housekeeping = Housekeeping(
                    stores.jobs, stores.uploads, stores.models, stores.webhooks, stores.audit, stores.heads
                )
                stack.enter_context(housekeeping.background())
            yield

    app = create_filter_app(
        moderator,
        filter_settings,
        screenings_uri=screenings_uri,
        recorder=recorder,
        routers=[
            files.router(stores),
            uploads.router(stores),
            erasures.router(stores),
            fine_tuning.router(stores),
            models.router(stores),
            chat.router(stores, model),
            completions.router(stores, model),
            webhooks.router(stores),
            reviews.router(stores),
            appeals.router(stores),
            audit.router(stores),
            *_training(stores),
        ],
        gate=Authenticator(stores, recorder or NullRecorder()),
        limits=service_limits(stores.settings, filter_settings.max_body_bytes),
        ready=stores.database.check,
        lifespan=lifespan,
        exposed=exposed,
        metrics_token=metrics_token,
    )
    if stores.training is not None:
        app.include_router(training_weights.download_router(stores, stores.training.store))
    for unstorable in (DataError, UnicodeEncodeError):
        app.add_exception_handler(unstorable, _unstorable)
    with_keys(app)
    return app


def _training(stores: Stores) -> list[APIRouter]:
    """The routers of the training API, if it is offered."""
    if stores.training is None:
        return []
    store = stores.training.store
    return [training.router(stores, store, stores.training), training_weights.router(stores, store)]


async def _unstorable(request: Request, error: Exception) -> JSONResponse:
    return response_of(invalid("A value has characters or numbers that cannot be stored."))
