"""`/appeals` and `/releases`: what an owner asks again, and models that wait for two signatures."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field, model_validator

from reft_ray.api import serializers as wire
from reft_ray.api.auth import Caller
from reft_ray.api.errors import ApiError
from reft_ray.api.stores import Stores
from reft_ray.jobs.appeals import Appeal
from reft_ray.jobs.releases import Release
from reft_ray.jobs.review import NOTE_CHARACTERS
from reft_ray.jobs.tenants import OWNER, Principal


class AppealBody(BaseModel):
    """The body of `POST /appeals`: a withheld row, or a job whose model was withheld."""

    model_config = ConfigDict(extra="forbid")

    review: str | None = Field(None, max_length=64)
    job: str | None = Field(None, max_length=64)
    note: str = Field(min_length=1, max_length=NOTE_CHARACTERS)

    @model_validator(mode="after")
    def _one(self) -> AppealBody:
        if (self.review is None) == (self.job is None):
            raise ValueError("name either a review or a job")
        return self


class AnswerBody(BaseModel):
    """The body of `POST /appeals/{id}/answer`."""

    model_config = ConfigDict(extra="forbid")

    granted: bool
    answer: str = Field(min_length=1, max_length=NOTE_CHARACTERS)


class NoteBody(BaseModel):
    """The body of a signature or a refusal."""

    model_config = ConfigDict(extra="forbid")

    note: str = Field(min_length=1, max_length=NOTE_CHARACTERS)


def router(stores: Stores) -> APIRouter:
    """The routes of appeals and releases."""
    routes = APIRouter()
    appeals, releases = stores.appeals, stores.releases

    @routes.post("/appeals", tags=["appeals"])
    def create_appeal(body: AppealBody, caller: Caller) -> dict[str, Any]:
        """Appeal a withheld row, or the release gate of a job; once each."""
        if body.review is not None:
            return appeal_body(appeals.of_row(body.review, body.note, caller.reviewer, caller.project_id), caller)
        return appeal_body(appeals.of_gate(str(body.job), body.note, caller.reviewer, caller.project_id), caller)

    @routes.get("/appeals", tags=["appeals"])
    def list_appeals(
        caller: Caller,
        state: Literal["open", "granted", "denied"] | None = None,
        job: Annotated[str | None, Query(max_length=64)] = None,
        after: Annotated[str | None, Query(max_length=64)] = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    ) -> dict[str, Any]:
        """List appeals, newest first."""
        page = appeals.list(caller.visible, state, job, after, limit)
        return wire.cursor_page(page, lambda appeal: appeal_body(appeal, caller))

    @routes.get("/appeals/{appeal_id}", tags=["appeals"])
    def retrieve_appeal(appeal_id: str, caller: Caller) -> dict[str, Any]:
        """Retrieve an appeal."""
        return appeal_body(appeals.get(appeal_id, caller.visible), caller)

    @routes.post("/appeals/{appeal_id}/answer", tags=["appeals"])
    def answer_appeal(appeal_id: str, body: AnswerBody, caller: Caller) -> dict[str, Any]:
        """Answer an appeal. Granting one of a row approves the row; an overturned block may need a second person."""
        if caller.role == OWNER:
            raise ApiError(403, "An appeal is answered by a curator.", code="insufficient_permissions")
        return appeal_body(appeals.answer(appeal_id, body.granted, body.answer, caller.reviewer), caller)

    @routes.get("/releases", tags=["releases"])
    def list_releases(
        state: Literal["waiting", "signed", "released", "refused"] | None = None,
    ) -> dict[str, Any]:
        """List models that failed the gate and were put before people."""
        return wire.whole_list(map(release_body, releases.list(state)))

    @routes.get("/releases/{job_id}", tags=["releases"])
    def retrieve_release(job_id: str) -> dict[str, Any]:
        """Retrieve the release of a job."""
        return release_body(releases.get(job_id))

    @routes.post("/releases/{job_id}/sign", tags=["releases"])
    def sign_release(job_id: str, body: NoteBody, caller: Caller) -> dict[str, Any]:
        """Sign a release; the second person's signature lets the job continue."""
        return release_body(releases.sign(job_id, body.note, caller.reviewer))

    @routes.post("/releases/{job_id}/refuse", tags=["releases"])
    def refuse_release(job_id: str, body: NoteBody, caller: Caller) -> dict[str, Any]:
        """Refuse a release; the job then fails."""
        return release_body(releases.refuse(job_id, body.note, caller.reviewer))

    return routes


def appeal_body(appeal: Appeal, caller: Principal) -> dict[str, Any]:
    """The `appeal` object. Owners do not see who answered."""
    times = {name: wire.seconds(getattr(appeal, name)) for name in ("created_at", "answered_at")}
    values = asdict(appeal) | times
    if caller.role == OWNER:
        del values["answered_by"]
    about = {name: values.pop(f"{name}_id") for name in ("review", "job", "project")}
    return {"object": "appeal", **about, **values}


def release_body(release: Release) -> dict[str, Any]:
    """The `release` object."""
    times = {name: wire.seconds(getattr(release, name)) for name in ("created_at", "signed_at", "decided_at")}
    values = asdict(release) | times
    return {"object": "release", "job": values.pop("job_id"), "project": values.pop("project_id"), **values}
