"""Install the console in the service's application, under /console."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import RedirectResponse, Response
from fastapi.staticfiles import StaticFiles

from reft_ray.api.auth import Authenticator
from reft_ray.api.chat_model import ChatModel
from reft_ray.api.moderator import Moderator
from reft_ray.api.stores import Stores
from reft_ray.console import (
    admin_pages,
    appeal_pages,
    job_pages,
    model_pages,
    queue_pages,
    sign_in_pages,
    training_pages,
)
from reft_ray.console.page import Site, templates
from reft_ray.console.session import Sessions
from reft_ray.telemetry.recorder import NullRecorder

STATIC = Path(__file__).parent / "static"


def install_console(
    app: FastAPI,
    stores: Stores,
    moderator: Moderator,
    chat: ChatModel,
    *,
    references: Mapping[str, str] | None = None,
    quality: Mapping[str, object] | None = None,
    oidc: sign_in_pages.Provider | None = None,
) -> None:
    """Add the pages to an application of `api.service_app`.

    `references` are the aligned adapters to compare students with, by base model; `quality` is the teacher's report
    (`teacher.json`), for its page; `oidc` an identity provider next to sign-in by key.
    """
    sessions = Sessions(stores, Authenticator(stores, NullRecorder()))
    site = Site(sessions, templates(), oidc.name if oidc else None, stores.training is not None)
    app.mount("/console/static", _Static(directory=STATIC), name="console-static")
    for router in (
        sign_in_pages.router(site, oidc),
        job_pages.router(site, stores),
        queue_pages.router(site, stores),
        appeal_pages.router(site, stores),
        model_pages.router(site, stores, moderator, chat, references or {}, quality or {}),
        admin_pages.router(site, stores),
    ):
        app.include_router(router, prefix="/console", include_in_schema=False)
    if stores.training is not None:
        app.include_router(
            training_pages.router(site, stores.training.store), prefix="/console", include_in_schema=False
        )
    app.add_api_route("/", _home, include_in_schema=False)


def _home() -> RedirectResponse:
    """The address of the service, opened in a browser."""
    return RedirectResponse("/console")


class _Static(StaticFiles):
    """Scripts and styles; a browser keeps them for an hour."""

    def file_response(self, *args: object, **options: object) -> Response:
        response = super().file_response(*args, **options)  # type: ignore[arg-type]
        response.headers["cache-control"] = "public, max-age=3600"
        response.headers["x-content-type-options"] = "nosniff"
        return response
