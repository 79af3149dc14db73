"""Rows of the job tables -> records, and the statement that writes an event."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Table, select
from sqlalchemy.dialects import postgresql, sqlite

from reft_ray.jobs import ids
from reft_ray.jobs.errors import NotFoundError
from reft_ray.jobs.job import Checkpoint, Event, Job, JobError, JobSpec, Status, StoredEvent
from reft_ray.jobs.tables import job_events, jobs

COLUMNS = [jobs.c[name] for name in Job.__dataclass_fields__]


def locked(connection: Connection, job_id: str) -> Job:
    """Read the job and lock its row until the transaction ends. Raises NotFoundError."""
    row = connection.execute(select(*COLUMNS).where(jobs.c.id == job_id).with_for_update()).first()
    if row is None:
        raise NotFoundError("fine-tuning job", job_id)
    return job_of(row)


def fetch(connection: Connection, job_id: str) -> Job:
    """Read the job. Raises NotFoundError."""
    row = connection.execute(select(*COLUMNS).where(jobs.c.id == job_id)).first()
    if row is None:
        raise NotFoundError("fine-tuning job", job_id)
    return job_of(row)


def append_event(connection: Connection, job_id: str, event: Event, now: float) -> None:
    """Add an event to the job's log, unless it has one with this key."""
    statement = upsert(connection, job_events).values(
        id=ids.new_id(ids.EVENT),
        job_id=job_id,
        key=event.key,
        level=event.level,
        type=event.type,
        message=event.message,
        data=dict(event.data),
        created_at=now,
    )
    connection.execute(statement.on_conflict_do_nothing(index_elements=["job_id", "key"]))


def upsert(connection: Connection, table: Table) -> Any:
    """An INSERT with ON CONFLICT, in the database's dialect."""
    return (sqlite if connection.dialect.name == "sqlite" else postgresql).insert(table)


def job_of(row: Any) -> Job:
    """A row of the COLUMNS of `jobs`."""
    values = dict(row._mapping)
    error = values["error"]
    return Job(
        **{
            **values,
            "status": Status(values["status"]),
            "spec": JobSpec.from_json(values["spec"]),
            "error": None if error is None else JobError(**error),
            "result_files": tuple(values["result_files"]),
        }
    )


def event_of(row: Any) -> StoredEvent:
    """A row of `job_events`."""
    return StoredEvent(row.id, row.created_at, Event(row.message, row.level, row.type, row.data, row.key))


def checkpoint_of(row: Any) -> Checkpoint:
    """A row of `job_checkpoints`."""
    return Checkpoint(row.id, row.job_id, row.step_number, row.uri, row.metrics, row.created_at)
