"""Models that failed the release gate and wait for two people, where the operator asks for that."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, insert, select, update

from reft_ray.jobs.errors import ConflictError, NotFoundError
from reft_ray.jobs.job import Event, Job, Status
from reft_ray.jobs.job_rows import locked
from reft_ray.jobs.job_store import JobStore
from reft_ray.jobs.review import Reviewer, checked_note
from reft_ray.jobs.tables import releases


class ReleaseState(StrEnum):
    """`waiting` for a first, `signed` waits for a second person."""

    WAITING = "waiting"
    SIGNED = "signed"
    RELEASED = "released"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Release:
    """The decision about one job's model."""

    job_id: str
    project_id: str
    state: ReleaseState
    created_at: float
    signed_by: str | None
    signed_note: str | None
    signed_at: float | None
    decided_by: str | None
    decided_note: str | None
    decided_at: float | None


_COLUMNS = [releases.c[field.name] for field in fields(Release)]


class Releases:
    """Ask for, sign and refuse releases; each is an entry of the audit log."""

    def __init__(self, store: JobStore) -> None:
        self.store = store
        self.database = store.database

    def get(self, job_id: str) -> Release:
        """One release. Raises NotFoundError."""
        found = self.find(job_id)
        if found is None:
            raise NotFoundError("release", job_id)
        return found

    def find(self, job_id: str) -> Release | None:
        """The release of a job, if any."""
        with self.database.read() as connection:
            return find_in(connection, job_id)

    def list(self, state: str | None = None) -> list[Release]:
        """Releases, newest first."""
        query = select(*_COLUMNS).order_by(releases.c.created_at.desc()).limit(1000)
        if state is not None:
            query = query.where(releases.c.state == state)
        with self.database.read() as connection:
            return [_release(row) for row in connection.execute(query)]

    def sign(self, job_id: str, note: str, by: Reviewer) -> Release:
        """Sign a release. The second person's signature lets the job continue; the same person cannot give both."""
        return self._decide(job_id, note, by, refuse=False)

    def refuse(self, job_id: str, note: str, by: Reviewer) -> Release:
        """Refuse a release; the job then fails with the gate's figures."""
        return self._decide(job_id, note, by, refuse=True)

    def _decide(self, job_id: str, note: str, by: Reviewer, refuse: bool) -> Release:
        note = checked_note("note", note)
        moved: Job | None = None
        with self.database.write() as connection:
            job = locked(connection, job_id)
            found = find_in(connection, job_id)
            if found is None:
                raise NotFoundError("release", job_id)
            if found.state in (ReleaseState.RELEASED, ReleaseState.REFUSED):
                raise ConflictError(f"The model of job {job_id} is {found.state}.", "release_decided")
            now = self.database.now()
            first = not refuse and found.state is ReleaseState.WAITING
            if not refuse and found.signed_by == by.name:
                raise ConflictError("Another person must give the second signature.", "second_person_needed")
            who = "signed" if first else "decided"
            state = ReleaseState.SIGNED if first else ReleaseState.REFUSED if refuse else ReleaseState.RELEASED
            values = {f"{who}_by": by.name, f"{who}_note": note, f"{who}_at": now}
            connection.execute(update(releases).where(releases.c.job_id == job_id).values(state=state, **values))
            data = {"id": job_id, "by": by.name, "note": note}
            self.store.audit.append_in(connection, f"release.{state}", by.actor, job.project_id, data)
            if not first and job.status is Status.PAUSED:
                event = Event(f"The release was {'refused' if refuse else 'signed by two people'}; the job continues")
                moved = self.store.move_in(connection, job, Status.QUEUED, event, sources={Status.PAUSED})
        if moved is not None:
            self.store.observe(job, moved)
        return self.get(job_id)


def request_in(connection: Connection, job: Job, now: float) -> Release:
    """The release of a job; asks for it the first time."""
    found = find_in(connection, job.id)
    if found is None:
        values = {"job_id": job.id, "project_id": job.project_id, "state": ReleaseState.WAITING, "created_at": now}
        connection.execute(insert(releases).values(**values))
        found = find_in(connection, job.id)
        if found is None:
            raise RuntimeError("a release that was just written is missing")
    return found


def find_in(connection: Connection, job_id: str) -> Release | None:
    """The release of a job, if any."""
    row = connection.execute(select(*_COLUMNS).where(releases.c.job_id == job_id)).first()
    return None if row is None else _release(row)


def _release(row: Any) -> Release:
    values = dict(row._mapping)
    return Release(**{**values, "state": ReleaseState(values["state"])})
