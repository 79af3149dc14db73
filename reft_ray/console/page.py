"""How a page is made: templates that escape everything, headers that let nothing foreign run, errors as HTML."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.routing import APIRoute
from jinja2 import Environment

from reft_ray.api.errors import ApiError, from_records
from reft_ray.console.session import Session, Sessions, SignInNeededError
from reft_ray.core.errors import ReftError
from reft_ray.html import templates_of

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
}


@dataclass(frozen=True, slots=True)
class Site:
    """What all pages share."""

    sessions: Sessions
    templates: Environment
    sign_in_with: str | None = None
    """The name of the identity provider, if there is one."""
    offers_training: bool = False

    def page(self, name: str, session: Session | None, status: int = 200, **values: Any) -> HTMLResponse:
        """A page from its template."""
        html = self.templates.get_template(f"{name}.html").render(
            session=session,
            now=time.time(),
            sign_in_with=self.sign_in_with,
            offers_training=self.offers_training,
            **values,
        )
        return HTMLResponse(html, status, dict(HEADERS))

    def fragment(self, name: str, session: Session, **values: Any) -> str:
        """A part of a page, for htmx and for server-sent events."""
        return self.templates.get_template(f"{name}.html").render(session=session, now=time.time(), **values)


def templates() -> Environment:
    """The templates' environment, with filters for times and numbers."""
    found = templates_of("reft_ray.console")
    found.filters |= {"time": _time, "age": _age, "score": _score, "percent": _percent, "bytes": _bytes}
    return found


def route_class(site: Site) -> type[APIRoute]:
    """Routes whose errors are pages, and which send a caller without a session to the sign-in page."""

    class ConsoleRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def with_pages(request: Request) -> Response:
                try:
                    response = await handle(request)
                except SignInNeededError as needed:
                    if request.headers.get("hx-request"):
                        return Response(status_code=204, headers={"hx-redirect": needed.location})
                    return RedirectResponse(needed.location, 303)
                except RequestValidationError:
                    return _failure(site, request, ApiError(400, "A value is missing or not allowed."))
                except (ApiError, ReftError) as error:
                    return _failure(site, request, error if isinstance(error, ApiError) else from_records(error))
                for name, value in HEADERS.items():
                    response.headers.setdefault(name, value)
                return response

            return with_pages

    return ConsoleRoute


def back(location: str) -> RedirectResponse:
    """Answer a form with the page that shows its effect."""
    return RedirectResponse(location, 303)


def _failure(site: Site, request: Request, error: ApiError) -> HTMLResponse:
    session = site.sessions.read(request)
    return site.page("error", session, error.status, title="Error", message=error.message)


def _time(seconds: float | None) -> str:
    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _age(seconds: float) -> str:
    for size, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {name}"
    return f"{max(0.0, seconds):.0f} s"


def _score(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.1f} %"


def _bytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
