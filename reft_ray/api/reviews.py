"""`/reviews`: rows that people decide about, for their owners to see and for curators to decide."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from reft_ray.api import serializers as wire
from reft_ray.api.auth import Caller
from reft_ray.api.stores import Stores
from reft_ray.core.conversation import parts
from reft_ray.core.decoding import readings
from reft_ray.core.proportion import Share
from reft_ray.jobs.errors import InvalidError, NotFoundError
from reft_ray.jobs.review import CODES, Action, Kind, Review
from reft_ray.jobs.review_queue import COMMENT_CHARACTERS, Filter
from reft_ray.jobs.review_stats import TeacherStats, counts, reasons, teacher_stats
from reft_ray.jobs.tenants import OWNER, Principal
from reft_ray.rows.text import full_conversation

StateName = Literal["pending", "confirm", "approved", "rejected", "withheld", "all"]


class Wanted(BaseModel):
    """Which rows; the query of `GET /reviews`, and part of a claim."""

    model_config = ConfigDict(extra="forbid")

    job: str | None = Field(None, max_length=64)
    file: str | None = Field(None, max_length=64)
    reason: str | None = Field(None, max_length=64)
    kind: Kind | None = None
    state: StateName = "pending"
    row: int | None = Field(None, ge=0, lt=1 << 62)

    def filter(self, caller: Principal) -> Filter:
        """The filter for this caller."""
        state = None if self.state == "all" else self.state
        return Filter(caller.visible, self.job, self.file, self.reason, self.kind, state, self.row)


class Listed(Wanted):
    """The query of `GET /reviews`."""

    order: Literal["nearness", "age"] = "nearness"
    after: str | None = Field(None, max_length=64)
    limit: int = Field(20, ge=1, le=1000)


class ClaimBody(Wanted):
    """The body of `POST /reviews/claim`: the nearest free row after the row `after`."""

    after: str | None = Field(None, max_length=64)


class DecisionBody(BaseModel):
    """The body of a decision; `code` is one of `GET /reviews/codes`."""

    model_config = ConfigDict(extra="forbid")

    action: Action
    code: str = Field(max_length=32)
    comment: str = Field("", max_length=COMMENT_CHARACTERS)
    duplicates: bool = Field(False, description="Also decide about the free near-duplicates of the same job.")


class OneDecision(DecisionBody):
    """The body of `POST /reviews/{id}/decision`; `version` refuses a row that has changed since."""

    version: int | None = None


class ManyDecisions(DecisionBody):
    """The body of `POST /reviews/decisions`: all rows are decided, or none."""

    ids: list[str] = Field(min_length=1, max_length=500)


def router(stores: Stores) -> APIRouter:
    """The routes of reviews."""
    routes = APIRouter(tags=["reviews"])
    queue = stores.reviews

    @routes.get("/reviews")
    def list_reviews(caller: Caller, query: Annotated[Listed, Query()]) -> dict[str, Any]:
        """List rows without their text, the nearest to their threshold first."""
        page = queue.list(query.filter(caller), query.order, query.after, query.limit)
        return wire.cursor_page(page, lambda review: review_body(review, caller, stores.database.now()))

    @routes.get("/reviews/codes")
    def list_codes() -> dict[str, Any]:
        """The reason codes of each decision."""
        return {"object": "review.codes", **{str(action): dict(codes) for action, codes in CODES.items()}}

    @routes.get("/reviews/summary")
    def summary(caller: Caller, query: Annotated[Wanted, Query()]) -> dict[str, Any]:
        """Count rows by state and reason, and what the decisions say about each teacher."""
        wanted = query.filter(caller)
        return {
            "object": "review.summary",
            "states": counts(stores.database, replace(wanted, state=None)),
            "reasons": reasons(stores.database, wanted),
            "teachers": [teacher_body(stats) for stats in teacher_stats(stores.database, caller.visible)],
        }

    @routes.post("/reviews/claim")
    def claim_next(body: ClaimBody, caller: Caller) -> dict[str, Any]:
        """Reserve the nearest free row for ten minutes; `review` is null when none is free."""
        found = queue.claim(caller.reviewer, body.filter(caller), body.after)
        review = None if found is None else review_body(found, caller, stores.database.now())
        return {"object": "review.claim", "review": review}

    @routes.post("/reviews/decisions")
    def decide_many(body: ManyDecisions, caller: Caller) -> dict[str, Any]:
        """Decide about several rows with one reason."""
        return decided(body, body.ids, caller)

    @routes.get("/reviews/{review_id}")
    def retrieve(review_id: str, caller: Caller) -> dict[str, Any]:
        """Retrieve a row without its text."""
        return review_body(queue.get(review_id, caller.visible), caller, stores.database.now())

    @routes.get("/reviews/{review_id}/text")
    def text(review_id: str, caller: Caller) -> dict[str, Any]:
        """The row's text, which may be disturbing: its messages, and its parts with their decoded readings."""
        return text_of(stores, queue.get(review_id, caller.visible))

    @routes.post("/reviews/{review_id}/claim")
    def claim(review_id: str, caller: Caller) -> dict[str, Any]:
        """Reserve this row for ten minutes, or prolong that."""
        queue.get(review_id, caller.visible)
        found = queue.claim(caller.reviewer, review_id=review_id)
        if found is None:
            raise NotFoundError("review", review_id)
        return review_body(found, caller, stores.database.now())

    @routes.post("/reviews/{review_id}/release")
    def release(review_id: str, caller: Caller) -> dict[str, Any]:
        """Give a reserved row back."""
        queue.release(queue.get(review_id, caller.visible).id, caller.reviewer)
        return review_body(queue.get(review_id, caller.visible), caller, stores.database.now())

    @routes.post("/reviews/{review_id}/decision")
    def decide(review_id: str, body: OneDecision, caller: Caller) -> dict[str, Any]:
        """Decide about a row. The last decision about a waiting job lets it continue."""
        return decided(body, [review_id], caller, body.version)

    def decided(body: DecisionBody, ids: list[str], caller: Principal, version: int | None = None) -> dict[str, Any]:
        if caller.role == OWNER:
            raise InvalidError("An owner cannot decide about their own rows; appeal them.", None, "not_a_reviewer")
        made = queue.decide(
            ids,
            body.action,
            body.code,
            body.comment,
            caller.reviewer,
            duplicates=body.duplicates,
            version=version,
        )
        return wire.whole_list(review_body(review, caller, stores.database.now()) for review in made)

    return routes


def review_body(review: Review, caller: Principal, now: float) -> dict[str, Any]:
    """The `review` object. Owners do not see who decides, nor the comments for colleagues."""
    body = {
        "id": review.id,
        "object": "review",
        "created_at": wire.seconds(review.created_at),
        "decided_at": wire.seconds(review.decided_at),
        "job": review.job_id,
        "file": review.file_id,
        "project": review.project_id,
        "kind": str(review.kind),
        "row": review.row_number,
        "line": review.line,
        "content_id": review.content_id,
        "decision": review.decision,
        "reason": review.reason,
        "part": review.part,
        "encoding": review.encoding,
        "score": review.score,
        "probability": review.probability,
        "threshold": review.threshold,
        "teacher": review.teacher,
        "decided_by": review.judge,
        "guard_score": review.guard_score,
        "cluster": review.cluster,
        "state": str(review.state),
        "version": review.version,
        "code": review.code,
    }
    if caller.role == OWNER:
        return body
    return {
        **body,
        "comment": review.comment,
        "reviewer": review.reviewer,
        "first_reviewer": review.first_by,
        "held_by": review.holder(now),
        "held_until": wire.seconds(review.held_until) if review.holder(now) else None,
    }


def teacher_body(stats: TeacherStats) -> dict[str, Any]:
    """What people's decisions say about a teacher; shares with their 95 % interval, null before any decision."""

    def share(found: Share) -> dict[str, Any]:
        return {"count": found.count, "of": found.of, "value": found.value, "interval": list(found.bounds)}

    return {
        "teacher": stats.teacher,
        "rows": stats.rows,
        "withheld": stats.withheld,
        "overturned": share(stats.overturned),
        "missed": share(stats.missed),
        "false_positives": {bound: stats.false_positives(bound) for bound in ("estimate", "low", "high")},
    }


def text_of(stores: Stores, review: Review) -> dict[str, Any]:
    """A row's text. Raises NotFoundError when it was deleted with its file or after thirty days."""
    content = stores.files.read_range(review.text_file, review.project_id, review.text_offset, review.text_bytes)
    row = orjson.loads(content)
    judged = row.get("judged", row["messages"])
    found = []
    for part in parts(full_conversation(judged)):
        decoded = [{"encoding": encoding, "text": text} for encoding, text in readings(part.text) if encoding]
        found.append({"name": part.name, "text": part.text, "decoded": decoded, "decided": part.name == review.part})
    return {"id": review.id, "object": "review.text", "messages": row["messages"], "parts": found}
