"""Overview, jobs and files: what happens now, what was withheld, and what people may do about it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, Query, Request
from fastapi.responses import HTMLResponse, Response, StreamingResponse

from reft_ray.api.errors import ApiError
from reft_ray.api.stores import Stores
from reft_ray.console import charts
from reft_ray.console.job_view import JobView, report_of
from reft_ray.console.page import Site, back, route_class
from reft_ray.console.session import Session
from reft_ray.jobs.job import TERMINAL, Job
from reft_ray.jobs.review_queue import Filter
from reft_ray.jobs.review_stats import counts, oldest_pending, teacher_stats

LIVE_SECONDS = 1.0
LIVE_LIMIT = 1800
"""How often a live page looks for changes, and how many times; the browser then asks again."""


def router(site: Site, stores: Stores) -> APIRouter:
    """The routes of jobs."""
    routes = APIRouter(route_class=route_class(site))
    sessions, jobs = site.sessions, stores.jobs

    @routes.get("")
    def overview(request: Request) -> HTMLResponse:
        session = sessions.required(request)
        visible = session.principal.visible
        by_status: dict[str, int] = {}
        for (project, status), count in jobs.counts().items():
            if visible in (None, project):
                by_status[str(status)] = by_status.get(str(status), 0) + count
        oldest = oldest_pending(stores.database) if visible is None else None
        return site.page(
            "overview",
            session,
            title="Overview",
            jobs=jobs.list(visible, limit=20).items,
            by_status=by_status,
            states=counts(stores.database, Filter(visible, kind="withheld", state=None)),
            oldest=None if oldest is None else stores.database.now() - oldest,
            appeals=stores.appeals.list(visible, "open", limit=5).items,
            releases=[item for item in stores.releases.list() if item.state in ("waiting", "signed")]
            if session.may("releases.read")
            else [],
            teachers=list(teacher_stats(stores.database, visible)),
        )

    @routes.get("/jobs")
    def list_jobs(request: Request, after: Annotated[str, Query(max_length=64)] = "") -> HTMLResponse:
        session = sessions.required(request)
        page = jobs.list(session.principal.visible, after=after or None, limit=50)
        return site.page("jobs", session, title="Jobs", jobs=page.items, has_more=page.has_more)

    @routes.get("/jobs/{job_id}")
    def job_page(request: Request, job_id: str) -> HTMLResponse:
        session = sessions.required(request)
        view = JobView.of(stores, jobs.get(job_id, session.principal.visible))
        return site.page("job", session, title="Job", view=view, job=view.job, may_steer=_may_steer(session))

    @routes.get("/jobs/{job_id}/live")
    async def live(request: Request, job_id: str) -> StreamingResponse:
        session = sessions.required(request)
        await asyncio.to_thread(jobs.get, job_id, session.principal.visible)

        async def changes() -> AsyncIterator[str]:
            seen = ""
            for _ in range(LIVE_LIMIT):
                job, html = await asyncio.to_thread(fragment, session, job_id)
                if html != seen:
                    seen = html
                    yield _server_sent("job", html)
                if job.status in TERMINAL:
                    yield _server_sent("ended", "")
                    return
                await asyncio.sleep(LIVE_SECONDS)

        headers = {"x-accel-buffering": "no"}
        return StreamingResponse(changes(), media_type="text/event-stream", headers=headers)

    def fragment(session: Session, job_id: str) -> tuple[Job, str]:
        view = JobView.of(stores, jobs.get(job_id, session.principal.visible))
        return view.job, site.fragment("job_live", session, view=view, job=view.job)

    @routes.post("/jobs/{job_id}/{verb}")
    def steer(
        request: Request,
        job_id: str,
        verb: Literal["pause", "resume", "cancel"],
        csrf: Annotated[str, Form(max_length=100)] = "",
    ) -> Response:
        session = sessions.posted(request, csrf)
        if not _may_steer(session):
            raise ApiError(403, f"Your role ({session.principal.role}) does not steer jobs.")
        jobs.steer(jobs.get(job_id, session.principal.visible), verb, session.principal.actor)
        return back(f"/console/jobs/{job_id}")

    @routes.get("/jobs/{job_id}/file")
    def file_page(
        request: Request, job_id: str, threshold: Annotated[float | None, Query(ge=-1, le=1)] = None
    ) -> HTMLResponse:
        session = sessions.required(request)
        job = jobs.get(job_id, session.principal.visible)
        report = report_of(stores, job)
        if report is None:
            raise ApiError(404, "This job has no screening report yet, or it was deleted.")
        bins: list[int] = report.get("histogram", [])
        limits: dict[str, Any] = report.get("judges", {}).get("thresholds", {})
        marks = {name: (value, charts.at(value)) for name, value in limits.items() if isinstance(value, float)}
        own = (report.get("job_threshold") or {}).get("own")
        if own is not None:
            marks["dataset"] = (own, charts.at(own))
        return site.page(
            "file",
            session,
            title="File",
            job=job,
            report=report,
            bars=charts.histogram(bins),
            marks=marks,
            threshold=threshold,
            above=None if threshold is None else charts.above(bins, threshold),
            total=sum(bins),
            states=counts(stores.database, Filter(session.principal.visible, job=job.id, kind="withheld", state=None)),
        )

    @routes.get("/files/{job_id}/{file_id}")
    def download(request: Request, job_id: str, file_id: str) -> StreamingResponse:
        session = sessions.required(request)
        job = jobs.get(job_id, session.principal.visible)
        if file_id not in job.result_files or not (session.is_owner or session.may("reviews.read")):
            raise ApiError(404, "No such file of this job.")
        record = stores.files.get(file_id, job.project_id)
        data = {"id": file_id, "job_id": job.id}
        stores.audit.append("file.downloaded", session.principal.actor, job.project_id, data)
        return StreamingResponse(
            stores.files.read(file_id, job.project_id),
            media_type="application/octet-stream",
            headers={"content-disposition": f'attachment; filename="{_safe(record.filename)}"'},
        )

    return routes


def _may_steer(session: Session) -> bool:
    return session.may("fine_tuning.write")


def _safe(name: str) -> str:
    return "".join(char if char.isascii() and (char.isalnum() or char in "._-") else "_" for char in name)


def _server_sent(event: str, html: str) -> str:
    lines = "".join(f"data: {line}\n" for line in html.splitlines() or [""])
    return f"event: {event}\n{lines}\n"
