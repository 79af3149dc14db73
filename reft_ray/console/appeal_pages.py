"""Appeals of rows and models, and the release of models that failed the gate."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Form, Query, Request
from fastapi.responses import HTMLResponse, Response

from reft_ray.api.errors import ApiError
from reft_ray.api.stores import Stores
from reft_ray.console.job_view import JobView
from reft_ray.console.page import Site, back, route_class
from reft_ray.console.text import row_parts
from reft_ray.jobs.appeals import AppealState
from reft_ray.jobs.review import NOTE_CHARACTERS

Token = Annotated[str, Form(max_length=100)]
Note = Annotated[str, Form(max_length=NOTE_CHARACTERS)]


def router(site: Site, stores: Stores) -> APIRouter:
    """The routes of appeals and releases."""
    routes = APIRouter(route_class=route_class(site))
    sessions, appeals, releases = site.sessions, stores.appeals, stores.releases

    @routes.get("/appeals")
    def list_appeals(request: Request, state: Annotated[str, Query(max_length=16)] = "open") -> HTMLResponse:
        session = sessions.required(request)
        session.need("appeals.read")
        known = state if state in {str(each) for each in AppealState} else None
        found = appeals.list(session.principal.visible, known, limit=100)
        return site.page("appeals", session, title="Appeals", appeals=found.items, state=known or "all")

    @routes.get("/appeals/{appeal_id}")
    def appeal_page(request: Request, appeal_id: str) -> HTMLResponse:
        session = sessions.required(request)
        session.need("appeals.read")
        appeal = appeals.get(appeal_id, session.principal.visible)
        review = stores.reviews.get(appeal.review_id) if appeal.review_id else None
        job = JobView.of(stores, stores.jobs.get(appeal.job_id))
        may = not session.is_owner and session.may("appeals.write")
        shown = row_parts(stores, review) if review is not None else None
        return site.page(
            "appeal", session, title="Appeal", appeal=appeal, review=review, view=job, parts=shown, may_answer=may
        )

    @routes.post("/appeals")
    def create(
        request: Request,
        note: Note,
        review: Annotated[str, Form(max_length=64)] = "",
        job: Annotated[str, Form(max_length=64)] = "",
        csrf: Token = "",
    ) -> Response:
        session = sessions.posted(request, csrf)
        session.need("appeals.write")
        if not session.is_owner and session.principal.role != "operator":
            raise ApiError(403, "An appeal is made by the owner of the row.")
        by, project = session.principal.reviewer, session.principal.project_id
        made = appeals.of_row(review, note, by, project) if review else appeals.of_gate(job, note, by, project)
        return back(f"/console/appeals/{made.id}")

    @routes.post("/appeals/{appeal_id}/answer")
    def answer(
        request: Request,
        appeal_id: str,
        answer: Note,
        granted: Annotated[str, Form(max_length=8)],
        csrf: Token = "",
    ) -> Response:
        session = sessions.posted(request, csrf)
        session.need("appeals.write")
        if session.is_owner:
            raise ApiError(403, "An appeal is answered by a curator.")
        appeals.answer(appeal_id, granted == "yes", answer, session.principal.reviewer)
        return back(f"/console/appeals/{appeal_id}")

    @routes.get("/releases")
    def list_releases(request: Request) -> HTMLResponse:
        session = sessions.required(request)
        session.need("releases.read")
        return site.page("releases", session, title="Releases", releases=releases.list())

    @routes.get("/releases/{job_id}")
    def release_page(request: Request, job_id: str) -> HTMLResponse:
        session = sessions.required(request)
        session.need("releases.read")
        view = JobView.of(stores, stores.jobs.get(job_id))
        return site.page("release", session, title="Release", release=releases.get(job_id), view=view, job=view.job)

    @routes.post("/releases/{job_id}/decide")
    def decide(
        request: Request,
        job_id: str,
        note: Note,
        action: Annotated[str, Form(max_length=8)],
        csrf: Token = "",
    ) -> Response:
        session = sessions.posted(request, csrf)
        session.need("releases.write")
        (releases.refuse if action == "refuse" else releases.sign)(job_id, note, session.principal.reviewer)
        return back(f"/console/releases/{job_id}")

    return routes
