"""The queue of rows that people decide about. Every change is compare-and-set, with its audit entry."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, Select, Table, bindparam, func, insert, or_, select, tuple_, update

from reft_ray.jobs import ids
from reft_ray.jobs.errors import ConflictError, InvalidError, NotFoundError
from reft_ray.jobs.job import Event, Job, Status
from reft_ray.jobs.job_rows import locked
from reft_ray.jobs.job_store import JobStore
from reft_ray.jobs.paging import Page
from reft_ray.jobs.review import (
    CODES,
    COLUMNS,
    DECIDED,
    LEASE_SECONDS,
    OPEN,
    SERVICE,
    Action,
    FiledRow,
    Kind,
    Review,
    Reviewer,
    State,
    review_of,
)
from reft_ray.jobs.tables import job_steps, reviews
from reft_ray.telemetry import catalog

BATCH = 500
ANALYZED_ROWS = 2000
"""This many new rows change which index is fast; PostgreSQL itself counts them a minute or two later."""
COMMENT_CHARACTERS = 2000


@dataclass(frozen=True, slots=True)
class Filter:
    """Which rows; None does not limit. `project` limits to one project: what a customer may see."""

    project: str | None = None
    job: str | None = None
    file: str | None = None
    reason: str | None = None
    kind: str | None = None
    state: str | None = State.PENDING
    row_number: int | None = None
    cluster: str | None = None

    @property
    def one_by_one(self) -> bool:
        """Whether this chooses by what `review_counts` does not have."""
        return self.row_number is not None or self.cluster is not None

    def clauses(self, table: Table = reviews) -> list[ColumnElement[bool]]:
        """The conditions in SQL, for `reviews` or, unless `one_by_one`, `review_counts`."""
        names = {"project": "project_id", "job": "job_id", "file": "file_id"}
        given: dict[str, Any] = {
            field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None
        }
        if self.kind is not None:
            # Written into the statement: SQLite uses the index of the kept rows for no parameter.
            given["kind"] = bindparam(None, str(Kind(self.kind)), literal_execute=True)
        return [table.c[names.get(name, name)] == value for name, value in given.items()]


class ReviewQueue:
    """File, list, claim and decide. With `second_person`, a block is overturned by two people."""

    def __init__(self, store: JobStore, second_person: bool = False, lease_seconds: float = LEASE_SECONDS) -> None:
        self.store = store
        self.database = store.database
        self.second_person = second_person
        self.lease_seconds = lease_seconds

    # For the steps of a job

    def file(self, job: Job, rows: Iterable[FiledRow]) -> None:
        """Add a job's rows; those that are there already stay as they are.

        Withheld rows wait for people under the policy `review`. One whose content a person of this project has
        approved before is approved again.
        """
        known = select(reviews.c.row_number).where(reviews.c.job_id == job.id)
        with self.database.read() as connection:
            present = set(connection.execute(known).scalars())
        new, added = (row for row in rows if row.row_number not in present), 0
        while batch := list(islice(new, BATCH)):
            with self.database.write() as connection:
                self._file_batch(connection, job, batch)
            added += len(batch)
        if added >= ANALYZED_ROWS:
            self.database.analyze(reviews)

    def _file_batch(self, connection: Connection, job: Job, batch: Sequence[FiledRow]) -> None:
        now = self.database.now()
        before = select(reviews.c.content_id, reviews.c.id).where(
            reviews.c.project_id == job.project_id,
            reviews.c.content_id.in_([row.content_id for row in batch if row.kind is Kind.WITHHELD]),
            reviews.c.state == State.APPROVED,
            reviews.c.kind == Kind.WITHHELD,
        )
        approved = {row.content_id: row.id for row in connection.execute(before)}
        waits = State.PENDING if job.spec.options.policy == "review" else State.WITHHELD
        records, entries = [], []
        for row in batch:
            review_id = ids.derived_id(ids.REVIEW, job.id, str(row.row_number))
            record: dict[str, Any] = {
                **row.values(),
                "id": review_id,
                "project_id": job.project_id,
                "job_id": job.id,
                "file_id": job.spec.training_file,
                "state": State.PENDING if row.kind is Kind.KEPT else waits,
                "version": 0,
                "created_at": now,
                "reviewer": None,
                "code": None,
                "comment": None,
                "decided_at": None,
            }
            if row.kind is Kind.WITHHELD and (earlier := approved.get(row.content_id)):
                record |= {"state": State.APPROVED, "reviewer": SERVICE.name, "code": "approved_before"}
                record |= {"comment": f"See {earlier}", "decided_at": now}
                entries.append({"id": review_id, "job_id": job.id, "row": row.row_number, "earlier": earlier})
            records.append(record)
        # Their job is locked before the audit log, as by `decide`: two orders would be a deadlock.
        connection.execute(insert(reviews), records)
        for data in entries:
            self.store.audit.append_in(connection, "review.approved", SERVICE.actor, job.project_id, data)

    def decided(self, job_id: str) -> list[Review]:
        """A job's decided rows, in order."""
        decided = reviews.c.state.in_(DECIDED)
        query = select(*COLUMNS).where(reviews.c.job_id == job_id, decided).order_by(reviews.c.row_number)
        with self.database.read() as connection:
            return [review_of(row) for row in connection.execute(query)]

    # For people

    def get(self, review_id: str, project: str | None = None) -> Review:
        """One row. Raises NotFoundError, also for a row of another project."""
        with self.database.read() as connection:
            row = connection.execute(select(*COLUMNS).where(reviews.c.id == review_id)).first()
        if row is None or (project is not None and row.project_id != project):
            raise NotFoundError("review", review_id)
        return review_of(row)

    def list(
        self,
        wanted: Filter,
        order: Literal["nearness", "age"] = "nearness",
        after: str | None = None,
        limit: int = 20,
    ) -> Page[Review]:
        """Rows, the nearest to their threshold or the oldest first. Raises InvalidError for an unknown cursor."""
        query = select(*COLUMNS).where(*wanted.clauses())
        with self.database.read() as connection:
            rows = connection.execute(_ordered(connection, query, order, after).limit(limit + 1)).all()
        return Page(tuple(map(review_of, rows[:limit])), len(rows) > limit)

    def duplicates(self, review: Review) -> int:
        """The number of other open rows of the job in its cluster."""
        query = select(func.count()).where(*self._cluster(review))
        with self.database.read() as connection:
            return int(connection.execute(query).scalar_one())

    def claim(
        self,
        by: Reviewer,
        wanted: Filter | None = None,
        after: str | None = None,
        review_id: str | None = None,
    ) -> Review | None:
        """Reserve a row for ten minutes: the nearest free one after `after`, or `review_id`; None when none is free.

        A row that `by` has approved is left for another person. Raises ConflictError when `review_id` is not free.
        """
        wanted, now = wanted or Filter(), self.database.now()
        free = or_(reviews.c.held_until.is_(None), reviews.c.held_until < now, reviews.c.held_by == by.name)
        mine = or_(reviews.c.first_by.is_(None), reviews.c.first_by != by.name)
        with self.database.write() as connection:
            if review_id is None:
                query = select(*COLUMNS).where(*wanted.clauses()).where(free, mine, reviews.c.state.in_(OPEN))
                query = _ordered(connection, query, "nearness", after)
            else:
                query = select(*COLUMNS).where(reviews.c.id == review_id)
            row = connection.execute(query.limit(1).with_for_update(skip_locked=review_id is None)).first()
            if row is None:
                if review_id is not None:
                    raise NotFoundError("review", review_id)
                return None
            found = review_of(row)
            _check_open(found, OPEN)
            self._check_free(found, by, now)
            values: dict[str, Any] = {"held_by": by.name, "held_until": now + self.lease_seconds}
            connection.execute(update(reviews).where(reviews.c.id == found.id).values(**values))
        return replace(found, **values)

    def release(self, review_id: str, by: Reviewer) -> None:
        """Give a claimed row back."""
        mine = (reviews.c.id == review_id) & (reviews.c.held_by == by.name)
        with self.database.write() as connection:
            connection.execute(update(reviews).where(mine).values(held_by=None, held_until=None))

    def decide(
        self,
        review_ids: Sequence[str],
        action: Action,
        code: str,
        comment: str,
        by: Reviewer,
        *,
        duplicates: bool = False,
        version: int | None = None,
        among: Sequence[State] = OPEN,
    ) -> Sequence[Review]:
        """Decide about rows, and with `duplicates` about the free open rows of their clusters: all, or none.

        The last decision about a waiting job lets it continue. Raises InvalidError, NotFoundError, or ConflictError for
        a row that is decided, is held by another person, is not at `version`, or needs a second person.
        """
        check_decision(action, code, comment)
        with self.database.write() as connection:
            named, jobs = self._lock(connection, review_ids)
            found = [*named]
            now = self.database.now()
            for review in named:
                if version is not None and review.version != version:
                    raise ConflictError(f"Review {review.id} has changed since version {version}.", "review_changed")
            if duplicates:
                seen = {review.id for review in found}
                for review in named:
                    query = select(*COLUMNS).where(*self._cluster(review)).with_for_update()
                    others = [review_of(row) for row in connection.execute(query)]
                    free = [o for o in others if o.holder(now) in (None, by.name) and o.first_by != by.name]
                    found += [other for other in free if other.id not in seen]
                    seen.update(review.id for review in found)
            after = [self._decide(connection, review, action, code, comment, by, among, now) for review in found]
            moved = [self._continue(connection, job, now) for job in jobs]
        for pair in filter(None, moved):
            self.store.observe(*pair)
        self._count(after)
        return after

    def _lock(self, connection: Connection, review_ids: Sequence[str]) -> tuple[Sequence[Review], Sequence[Job]]:
        """Lock the jobs of these rows, so that the last decision sees all others, and then the rows."""
        query = select(*COLUMNS).where(reviews.c.id.in_(review_ids)).order_by(reviews.c.seq)
        job_ids = sorted({row.job_id for row in connection.execute(query)})
        jobs = [locked(connection, job_id) for job_id in job_ids]
        found = [review_of(row) for row in connection.execute(query.with_for_update())]
        if missing := set(review_ids) - {review.id for review in found}:
            raise NotFoundError("review", min(missing))
        return found, jobs

    def _decide(
        self,
        connection: Connection,
        review: Review,
        action: Action,
        code: str,
        comment: str,
        by: Reviewer,
        among: Sequence[State],
        now: float,
    ) -> Review:
        _check_open(review, among)
        self._check_free(review, by, now)
        values: dict[str, Any] = {"held_by": None, "held_until": None, "version": review.version + 1}
        overturns = action is Action.APPROVE and review.decision == "block" and review.kind is Kind.WITHHELD
        if overturns and self.second_person and review.state is not State.CONFIRM:
            state = State.CONFIRM
            values |= {"state": state, "first_by": by.name}
        else:
            state = State.APPROVED if action is Action.APPROVE else State.REJECTED
            values |= {"state": state, "reviewer": by.name, "code": code, "comment": comment, "decided_at": now}
        mine = (reviews.c.id == review.id) & (reviews.c.version == review.version)
        if not connection.execute(update(reviews).where(mine).values(**values)).rowcount:
            raise ConflictError(f"Review {review.id} was decided by another person.", "review_decided")
        data = {"id": review.id, "job_id": review.job_id, "row": review.row_number, "code": code, "comment": comment}
        kind = "review.first_approved" if state is State.CONFIRM else f"review.{state}"
        self.store.audit.append_in(connection, kind, by.actor, review.project_id, {**data, "by": by.name})
        return replace(review, **values)

    def _check_free(self, review: Review, by: Reviewer, now: float) -> None:
        holder = review.holder(now)
        if holder not in (None, by.name):
            raise ConflictError(f"Review {review.id} is held by {holder}.", "review_claimed")
        if review.state is State.CONFIRM and review.first_by == by.name:
            raise ConflictError(
                f"Review {review.id} overturns a block: another person must confirm it.", "second_person_needed"
            )

    def _cluster(self, review: Review) -> Sequence[ColumnElement[bool]]:
        same = Filter(job=review.job_id, cluster=review.cluster, kind=review.kind, state=review.state)
        return [*same.clauses(), reviews.c.id != review.id]

    def _continue(self, connection: Connection, job: Job, now: float) -> tuple[Job, Job] | None:
        """Let a job continue that waits for nothing but the rows that are now decided."""
        if job.status is not Status.PAUSED or waits_in(connection, job.id):
            return None
        query = select(job_steps.c.name).where(job_steps.c.job_id == job.id)
        steps = set(connection.execute(query).scalars())
        if "ask" not in steps or "review" in steps:
            return None
        event = Event("All withheld examples are decided; the job continues")
        return job, self.store.move_in(connection, job, Status.VALIDATING, event, sources={Status.PAUSED})

    def _count(self, decided: Iterable[Review]) -> None:
        for review in decided:
            if review.decided_at is None or review.kind is Kind.KEPT:
                continue
            self.store.recorder.count(catalog.REVIEW_DECISIONS, outcome=str(review.state))
            self.store.recorder.observe(catalog.REVIEW_AGE, max(0.0, review.decided_at - review.created_at))


def waits_in(connection: Connection, job_id: str) -> bool:
    """Whether a withheld row of the job waits for a person."""
    waiting = (reviews.c.job_id == job_id) & (reviews.c.kind == Kind.WITHHELD) & reviews.c.state.in_(OPEN)
    return connection.execute(select(reviews.c.seq).where(waiting).limit(1)).first() is not None


def check_decision(action: Action, code: str, comment: str) -> None:
    """Raise InvalidError for an unknown reason code, a missing comment or a too long one."""
    if code not in CODES[action]:
        known = ", ".join(CODES[action])
        raise InvalidError(f"code: {code!r} is not a reason to {action}; choose from {known}", "code")
    if code.startswith("other_") and not comment.strip():
        raise InvalidError(f"comment: the code {code} needs one", "comment")
    if len(comment) > COMMENT_CHARACTERS:
        raise InvalidError(f"comment: at most {COMMENT_CHARACTERS} characters", "comment")


def _ordered(connection: Connection, query: Select[Any], order: str, after: str | None) -> Select[Any]:
    key = (reviews.c.margin, reviews.c.seq) if order == "nearness" else (reviews.c.seq,)
    if after is not None:
        start = connection.execute(select(*key).where(reviews.c.id == after)).first()
        if start is None:
            raise InvalidError(f"after: no such review: {after!r}", "after")
        query = query.where(tuple_(*key) > tuple_(*start))
    return query.order_by(*key)


def _check_open(review: Review, among: Sequence[State]) -> None:
    if review.state not in among:
        who = f" by {review.reviewer}" if review.reviewer else ""
        raise ConflictError(f"Review {review.id} is {review.state}{who}.", "review_decided")
