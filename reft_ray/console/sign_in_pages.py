"""Sign in by key, or through an identity provider (OpenID Connect)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Form, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from reft_ray.console.page import Site, back, route_class


class Provider(Protocol):
    """An identity provider, such as `console.oidc.OpenIdProvider`."""

    name: str

    async def start(self, callback: str) -> tuple[str, Mapping[str, Any]]:
        """The address to send a browser to, and what to remember until it returns."""
        ...

    async def finish(self, callback: str, address: str, remembered: Mapping[str, Any]) -> tuple[str, str]:
        """The person's name and role, from the address that the browser returned with. Raises ApiError."""
        ...


def router(site: Site, provider: Provider | None) -> APIRouter:
    """The routes of signing in and out."""
    routes = APIRouter(route_class=route_class(site))
    sessions = site.sessions

    @routes.get("/sign-in")
    def sign_in_page(request: Request, then: str = "/console") -> HTMLResponse:
        keyless = sessions.keyless(request)
        return site.page("sign_in", None, title="Sign in", then=_own(then), keyless=keyless, wrong=False)

    @routes.post("/sign-in")
    def sign_in(
        request: Request,
        key: Annotated[str, Form(max_length=200)] = "",
        then: Annotated[str, Form(max_length=500)] = "/console",
    ) -> Response:
        response = back(_own(then))
        if sessions.sign_in(request, response, key):
            return response
        keyless = sessions.keyless(request)
        return site.page("sign_in", None, 401, title="Sign in", then=_own(then), keyless=keyless, wrong=True)

    @routes.post("/sign-out")
    def sign_out(request: Request, csrf: Annotated[str, Form(max_length=100)] = "") -> Response:
        sessions.posted(request, csrf)
        response = back("/console/sign-in")
        sessions.sign_out(response)
        return response

    if provider is not None:
        _add_provider(routes, site, provider)
    return routes


def _add_provider(routes: APIRouter, site: Site, provider: Provider) -> None:
    @routes.get("/oidc")
    async def start(request: Request) -> Response:
        address, remembered = await provider.start(_callback(request))
        response = RedirectResponse(address, 303)
        site.sessions.remember(request, response, remembered)
        return response

    @routes.get("/oidc/callback")
    async def finish(request: Request) -> Response:
        remembered = site.sessions.remembered(request)
        user, role = await provider.finish(_callback(request), str(request.url), remembered)
        response = back("/console")
        site.sessions.open_for(request, response, user, role)
        site.sessions.forget(response)
        return response


def _callback(request: Request) -> str:
    return str(request.url.replace(path="/console/oidc/callback", query=""))


def _own(location: str) -> str:
    """A location on the console itself: a link must not send a person elsewhere after they sign in."""
    return location if location == "/console" or location.startswith("/console/") else "/console"
