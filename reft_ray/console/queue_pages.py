"""The queue: list, claim and decide rows, with the keys A, R and S."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlencode

from fastapi import APIRouter, Form, Query, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, Response

from reft_ray.api.errors import ApiError
from reft_ray.api.stores import Stores
from reft_ray.console.page import Site, back, route_class
from reft_ray.console.session import Session
from reft_ray.console.text import plain_text, row_parts
from reft_ray.jobs.errors import ConflictError
from reft_ray.jobs.review import CODES, OPEN, Action, Kind, State
from reft_ray.jobs.review_queue import Filter
from reft_ray.jobs.review_stats import counts, reasons

LIMIT = 50
Short = Annotated[str, Query(max_length=64)]
FormShort = Annotated[str, Form(max_length=64)]


def router(site: Site, stores: Stores) -> APIRouter:
    """The routes of the queue."""
    routes = APIRouter(route_class=route_class(site))
    queue, sessions = stores.reviews, site.sessions

    @routes.get("/queue")
    def queue_page(
        request: Request,
        job: Short = "",
        file: Short = "",
        reason: Short = "",
        kind: Short = "",
        state: Short = "pending",
        order: Short = "nearness",
        after: Short = "",
    ) -> HTMLResponse:
        session = sessions.required(request)
        session.need("reviews.read")
        wanted = _filter(session, job, file, reason, kind, state)
        ordered: Literal["nearness", "age"] = "age" if order == "age" else "nearness"
        page = queue.list(wanted, ordered, after or None, LIMIT)
        chosen = {"job": job, "file": file, "reason": reason, "kind": kind, "state": state, "order": ordered}
        return site.page(
            "queue",
            session,
            title="Queue",
            rows=page.items,
            has_more=page.has_more,
            chosen=chosen,
            query=urlencode({name: value for name, value in chosen.items() if value}),
            states=_states(session, job, file, kind),
            reasons=reasons(stores.database, _filter(session, job, file, "", kind, state)),
            clock=stores.database.now(),
        )

    @routes.post("/queue/next")
    def next_row(
        request: Request,
        csrf: FormShort = "",
        job: FormShort = "",
        kind: FormShort = "",
        after: FormShort = "",
        skip: FormShort = "",
    ) -> Response:
        session = sessions.posted(request, csrf)
        session.need("reviews.write")
        if skip:
            queue.release(skip, session.principal.reviewer)
        return _next(session, job, kind, after)

    @routes.get("/reviews/{review_id}")
    def row_page(
        request: Request, review_id: str, job: Short = "", kind: Short = "", refused: Short = ""
    ) -> HTMLResponse:
        session = sessions.required(request)
        session.need("reviews.read")
        review = queue.get(review_id, session.principal.visible)
        near = queue.list(
            Filter(session.principal.visible, job=review.job_id, cluster=review.cluster, state=None)
        ).items
        return site.page(
            "row",
            session,
            title=f"Row {review.row_number}",
            review=review,
            parts=row_parts(stores, review),
            near=[other for other in near if other.id != review.id],
            duplicates=queue.duplicates(review) if review.state in OPEN else 0,
            holder=review.holder(stores.database.now()),
            codes={str(action): codes for action, codes in CODES.items()},
            is_open=review.state in OPEN,
            appeal=stores.appeals.of_review(review.id),
            second_person=queue.second_person,
            chosen={"job": job, "kind": kind},
            refused=refused,
        )

    @routes.get("/reviews/{review_id}/plain")
    def row_text(request: Request, review_id: str) -> PlainTextResponse:
        session = sessions.required(request)
        session.need("reviews.read")
        text = plain_text(stores, queue.get(review_id, session.principal.visible))
        # A sandboxed document: no script runs in it, whatever a browser takes it for.
        return PlainTextResponse(text, headers={"content-security-policy": "sandbox; default-src 'none'"})

    @routes.post("/reviews/{review_id}/decide")
    def decide(
        request: Request,
        review_id: str,
        action: Annotated[Action, Form()],
        approve_code: FormShort = "",
        reject_code: FormShort = "",
        comment: Annotated[str, Form(max_length=2000)] = "",
        duplicates: FormShort = "",
        csrf: FormShort = "",
        job: FormShort = "",
        kind: FormShort = "",
    ) -> Response:
        session = sessions.posted(request, csrf)
        session.need("reviews.write")
        if session.is_owner:
            raise ApiError(403, "An owner cannot decide about their own rows; appeal them.")
        code = approve_code if action is Action.APPROVE else reject_code
        by = session.principal.reviewer
        try:
            queue.decide([review_id], action, code, comment, by, duplicates=bool(duplicates))
        except ConflictError as error:
            # Another person was faster: say so on the row, as it is now.
            location = {"job": job, "kind": kind, "refused": str(error)[:60]}
            return back(f"/console/reviews/{review_id}?{urlencode(location)}")
        return _next(session, job, kind, "")

    def _next(session: Session, job: str, kind: str, after: str) -> Response:
        by = session.principal.reviewer
        for state in OPEN:
            wanted = _filter(session, job, "", "", kind, state)
            found = queue.claim(by, wanted, after or None)
            if found is None and after:
                found = queue.claim(by, wanted)
            if found is not None:
                chosen = urlencode({name: value for name, value in (("job", job), ("kind", kind)) if value})
                return back(f"/console/reviews/{found.id}{'?' if chosen else ''}{chosen}")
        return back("/console/queue?state=pending")

    def _states(session: Session, job: str, file: str, kind: str) -> dict[str, int]:
        return counts(stores.database, _filter(session, job, file, "", kind, ""))

    return routes


def _filter(session: Session, job: str, file: str, reason: str, kind: str, state: str) -> Filter:
    known = state if state in {str(each) for each in State} else None
    of_kind = kind if kind in {str(each) for each in Kind} else None
    return Filter(session.principal.visible, job or None, file or None, reason or None, of_kind, known)
