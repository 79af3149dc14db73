"""Appeals: the owner of a withheld row or of a withheld model asks again, and a person answers."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from sqlalchemy import insert, select, update

from reft_ray.jobs import ids
from reft_ray.jobs.errors import ConflictError, NotFoundError
from reft_ray.jobs.job import Job
from reft_ray.jobs.lifecycle import UNSAFE_MODEL
from reft_ray.jobs.paging import Page, page
from reft_ray.jobs.review import Action, Reviewer, State, checked_note
from reft_ray.jobs.review_queue import ReviewQueue
from reft_ray.jobs.tables import appeals


class AppealState(StrEnum):
    """The state of an appeal."""

    OPEN = "open"
    GRANTED = "granted"
    DENIED = "denied"


@dataclass(frozen=True, slots=True)
class Appeal:
    """An appeal about the row `review_id`, or without one about the job's release gate."""

    id: str
    project_id: str
    job_id: str
    review_id: str | None
    state: AppealState
    note: str
    author: str
    created_at: float
    answer: str | None
    answered_by: str | None
    answered_at: float | None


_COLUMNS = [appeals.c[field.name] for field in fields(Appeal)]


class Appeals:
    """Create, list and answer appeals; each is an entry of the audit log."""

    def __init__(self, queue: ReviewQueue) -> None:
        self.queue = queue
        self.store = queue.store
        self.database = queue.database

    def of_row(self, review_id: str, note: str, by: Reviewer, project: str) -> Appeal:
        """Appeal a withheld row. Raises NotFoundError for another project's row, ConflictError for one that is not
        withheld or already appealed."""
        review = self.queue.get(review_id, project)
        if review.state is State.APPROVED or review.decision not in ("review", "block"):
            raise ConflictError(f"Review {review.id} is not withheld.", "not_appealable")
        return self._create(review.job_id, review.id, note, by, project)

    def of_gate(self, job_id: str, note: str, by: Reviewer, project: str) -> Appeal:
        """Appeal the release gate of a job. Raises ConflictError for a job whose model was not withheld."""
        job = self.store.get(job_id, project)
        if not (failed_gate(job) or _evaluated_and_paused(self.store.steps(job_id), job)):
            raise ConflictError(f"The model of job {job_id} was not withheld.", "not_appealable")
        return self._create(job_id, None, note, by, project)

    def _create(self, job_id: str, review_id: str | None, note: str, by: Reviewer, project: str) -> Appeal:
        note = checked_note("note", note)
        appeal_id = ids.new_id(ids.APPEAL)
        with self.database.write() as connection:
            self.database.serialize(connection, f"appeals of {project}")
            about = appeals.c.review_id.is_(None) if review_id is None else appeals.c.review_id == review_id
            query = select(appeals.c.id).where(appeals.c.job_id == job_id, about)
            if (earlier := connection.execute(query).scalar()) is not None:
                raise ConflictError(f"This was appealed before: see {earlier}.", "already_appealed")
            connection.execute(
                insert(appeals).values(
                    id=appeal_id,
                    project_id=project,
                    job_id=job_id,
                    review_id=review_id,
                    state=AppealState.OPEN,
                    note=note,
                    author=by.name,
                    created_at=self.database.now(),
                )
            )
            data = {"id": appeal_id, "job_id": job_id, "review_id": review_id}
            self.store.audit.append_in(connection, "appeal.created", by.actor, project, data)
        return self.get(appeal_id)

    def answer(self, appeal_id: str, grant: bool, answer: str, by: Reviewer) -> Appeal:
        """Answer an appeal. Granting one of a row approves the row, denying rejects it.

        Where an overturned block needs a second person, the answer is given when the row is confirmed. Raises
        ConflictError for an answered appeal.
        """
        answer = checked_note("answer", answer)
        appeal = self.get(appeal_id)
        if appeal.state is not AppealState.OPEN:
            raise ConflictError(f"Appeal {appeal_id} is {appeal.state} by {appeal.answered_by}.", "appeal_answered")
        if appeal.review_id is not None and not self._settle_row(appeal.review_id, grant, answer, by):
            return appeal
        state = AppealState.GRANTED if grant else AppealState.DENIED
        mine = (appeals.c.id == appeal_id) & (appeals.c.state == AppealState.OPEN)
        values = {"state": state, "answer": answer, "answered_by": by.name, "answered_at": self.database.now()}
        with self.database.write() as connection:
            if not connection.execute(update(appeals).where(mine).values(**values)).rowcount:
                raise ConflictError(f"Appeal {appeal_id} was answered by another person.", "appeal_answered")
            data = {"id": appeal_id, "job_id": appeal.job_id, "review_id": appeal.review_id, "answer": answer}
            self.store.audit.append_in(connection, f"appeal.{state}", by.actor, appeal.project_id, data)
        return self.get(appeal_id)

    def get(self, appeal_id: str, project: str | None = None) -> Appeal:
        """One appeal. Raises NotFoundError, also for another project's."""
        with self.database.read() as connection:
            row = connection.execute(select(*_COLUMNS).where(appeals.c.id == appeal_id)).first()
        if row is None or (project is not None and row.project_id != project):
            raise NotFoundError("appeal", appeal_id)
        return _appeal(row)

    def list(
        self,
        project: str | None = None,
        state: str | None = None,
        job: str | None = None,
        after: str | None = None,
        limit: int = 20,
    ) -> Page[Appeal]:
        """Appeals, newest first."""
        query = select(*_COLUMNS)
        for column, value in ((appeals.c.project_id, project), (appeals.c.state, state), (appeals.c.job_id, job)):
            if value is not None:
                query = query.where(column == value)
        with self.database.read() as connection:
            return page(connection, appeals, query, _appeal, after=after, limit=limit)

    def of_review(self, review_id: str) -> Appeal | None:
        """The appeal of a row."""
        with self.database.read() as connection:
            row = connection.execute(select(*_COLUMNS).where(appeals.c.review_id == review_id)).first()
        return None if row is None else _appeal(row)

    def _settle_row(self, review_id: str, grant: bool, answer: str, by: Reviewer) -> bool:
        """Decide about the row; False where a second person must confirm first."""
        wanted = State.APPROVED if grant else State.REJECTED
        if self.queue.get(review_id).state is wanted:
            return True
        action = Action.APPROVE if grant else Action.REJECT
        code = "other_harmless" if grant else "other_harmful"
        (review,) = self.queue.decide([review_id], action, code, answer, by, among=tuple(State))
        return review.state is wanted


def failed_gate(job: Job) -> bool:
    """Whether the job ended because its model did not pass the release gate."""
    return job.error is not None and job.error.code == UNSAFE_MODEL


def _evaluated_and_paused(steps: dict[str, Any], job: Job) -> bool:
    return job.status == "paused" and "evaluate" in steps and "export" not in steps


def _appeal(row: Any) -> Appeal:
    values = dict(row._mapping)
    return Appeal(**{**values, "state": AppealState(values["state"])})
