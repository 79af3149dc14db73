"""Sessions of training loops: for customers their own, for the operator's people all of them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse

from reft_ray.console.page import Site, route_class
from reft_ray.console.training_view import views_of
from reft_ray.jobs.training import TrainingStore

SHOWN_EVENTS = 100


def router(site: Site, store: TrainingStore) -> APIRouter:
    """The routes of training sessions."""
    routes = APIRouter(route_class=route_class(site))
    sessions = site.sessions

    @routes.get("/training")
    def list_sessions(request: Request, after: Annotated[str, Query(max_length=64)] = "") -> HTMLResponse:
        session = sessions.required(request)
        found, has_more = store.recent(session.principal.visible, after or None)
        views = views_of(store, found)
        return site.page("training", session, title="Training sessions", views=views, has_more=has_more)

    @routes.get("/training/{session_id}")
    def session_page(request: Request, session_id: str) -> HTMLResponse:
        session = sessions.required(request)
        (view,) = views_of(store, [store.session(session_id, session.principal.visible)])
        events = store.latest_events([each.model.id for each in view.models], SHOWN_EVENTS)
        return site.page("training_session", session, title="Training session", view=view, events=events)

    return routes
