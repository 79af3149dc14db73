"""Keys, roles and limits, retention, and the audit log with its verification."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Form, Query, Request
from fastapi.responses import HTMLResponse, Response

from reft_ray.api.stores import Stores
from reft_ray.console.page import Site, back, route_class
from reft_ray.jobs.results import REJECTED_SECONDS
from reft_ray.jobs.review import LEASE_SECONDS
from reft_ray.jobs.tenants import ROLES

Token = Annotated[str, Form(max_length=100)]
Name = Annotated[str, Form(min_length=1, max_length=100)]
PAGE = 100


def router(site: Site, stores: Stores) -> APIRouter:
    """The routes of administration."""
    routes = APIRouter(route_class=route_class(site))
    sessions = site.sessions

    @routes.get("/admin")
    def admin_page(request: Request) -> HTMLResponse:
        session = sessions.required(request)
        session.need("admin")
        return site.page("admin", session, title="Admin", secret=None, **_values())

    @routes.post("/admin/keys")
    def create_key(
        request: Request,
        name: Name,
        organization: Name = "default",
        project: Name = "default",
        role: Annotated[str, Form(max_length=16)] = "owner",
        days: Annotated[int, Form(ge=0, le=3650)] = 0,
        requests_per_minute: Annotated[int, Form(ge=0, le=1_000_000)] = 0,
        csrf: Token = "",
    ) -> HTMLResponse:
        session = sessions.posted(request, csrf)
        session.need("admin")
        limits = {"requests_per_minute": requests_per_minute} if requests_per_minute else None
        lifetime = days * 86400.0 if days else None
        _, secret = stores.tenants.create_key(
            organization, project, name, None, lifetime, limits, role, session.principal.actor
        )
        # Shown once, in the answer itself: it is stored nowhere.
        return site.page("admin", session, title="Admin", secret=secret, **_values())

    @routes.post("/admin/keys/{key_id}/revoke")
    def revoke_key(request: Request, key_id: str, csrf: Token = "") -> Response:
        session = sessions.posted(request, csrf)
        session.need("admin")
        stores.tenants.revoke(key_id, session.principal.actor)
        return back("/console/admin")

    @routes.get("/audit")
    def audit_page(
        request: Request,
        after: Annotated[int, Query(ge=0, lt=1 << 62)] = 0,
        type: Annotated[str, Query(max_length=64)] = "",
        verify: Annotated[str, Query(max_length=4)] = "",
    ) -> HTMLResponse:
        session = sessions.required(request)
        session.need("audit.read")
        found = stores.audit.entries(after, PAGE + 1, kind=type or None)
        return site.page(
            "audit",
            session,
            title="Audit log",
            entries=found[:PAGE],
            has_more=len(found) > PAGE,
            type=type,
            verification=stores.audit.verify() if verify else None,
        )

    def _values() -> dict[str, Any]:
        return {
            "keys": stores.tenants.list_keys(),
            "roles": ROLES,
            "clock": stores.database.now(),
            "settings": stores.settings,
            "rejected_days": REJECTED_SECONDS // 86400,
            "lease_minutes": int(LEASE_SECONDS // 60),
        }

    return routes
