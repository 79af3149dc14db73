"""Jobs, their events, checkpoints and finished steps in SQL. Every move is compare-and-set."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import Connection, Text, cast, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from reft_ray.jobs import ids, webhooks
from reft_ray.jobs.audit import AuditLog
from reft_ray.jobs.database import Database
from reft_ray.jobs.errors import ConflictError, LeaseLostError, NotFoundError, QuotaError, StoppedError
from reft_ray.jobs.job import (
    TERMINAL,
    TRANSITIONS,
    Checkpoint,
    Event,
    Job,
    JobError,
    JobSpec,
    Page,
    Status,
    StoredEvent,
)
from reft_ray.jobs.paging import page
from reft_ray.jobs.tables import job_checkpoints, job_events, job_steps, jobs

_COLUMNS = [column for column in jobs.c if column.name != "seq"]


class JobStore:
    """The records of all jobs."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.audit = AuditLog(database)

    def create(
        self,
        organization_id: str,
        project_id: str,
        spec: JobSpec,
        metadata: Mapping[str, str],
        *,
        actor: Mapping[str, Any] | None = None,
        max_unfinished: int | None = None,
    ) -> Job:
        """A new job in `validating_files`, with its first event; QuotaError above `max_unfinished` of a project."""
        job_id = ids.new_id(ids.JOB)
        with self.database.write() as connection:
            if max_unfinished is not None:
                self._check_quota(connection, project_id, max_unfinished)
            connection.execute(
                insert(jobs).values(
                    id=job_id,
                    organization_id=organization_id,
                    project_id=project_id,
                    status=Status.VALIDATING,
                    spec=spec.to_json(),
                    metadata=dict(metadata),
                    created_at=self.database.now(),
                    result_files=[],
                    attempt=0,
                    failures=0,
                )
            )
            self._append(connection, job_id, Event(f"Created fine-tuning job: {job_id}", key="created"))
            if actor is not None:
                self.audit.append_in(connection, "fine_tuning.job.created", actor, project_id, {"id": job_id})
            return _get(connection, job_id)

    def get(self, job_id: str, project_id: str | None = None) -> Job:
        """The job; with a project given, another project's job does not exist."""
        with self.database.read() as connection:
            job = _get(connection, job_id)
        if project_id is not None and job.project_id != project_id:
            raise NotFoundError("fine-tuning job", job_id)
        return job

    def list(
        self,
        project_id: str,
        *,
        after: str | None = None,
        limit: int = 20,
        metadata: Mapping[str, str] | None = None,
        without_metadata: bool = False,
    ) -> Page[Job]:
        """A project's jobs, newest first, optionally only those whose metadata hold the given pairs."""
        query = select(*_COLUMNS).where(jobs.c.project_id == project_id)
        for key, value in (metadata or {}).items():
            query = query.where(jobs.c.metadata[key].as_string() == value)
        if without_metadata:
            query = query.where(func.length(cast(jobs.c.metadata, Text)) <= len("{}"))
        with self.database.read() as connection:
            return page(connection, jobs, query, _job, after=after, limit=limit)

    def with_status(self, statuses: Collection[Status]) -> Sequence[Job]:
        """Every project's jobs in these states, oldest first."""
        query = select(*_COLUMNS).where(jobs.c.status.in_(statuses)).order_by(jobs.c.seq)
        with self.database.read() as connection:
            return [_job(row) for row in connection.execute(query)]

    def counts(self, project_id: str | None = None) -> dict[Status, int]:
        """How many jobs stand where; states without jobs are 0."""
        query = select(jobs.c.status, func.count()).group_by(jobs.c.status)
        if project_id is not None:
            query = query.where(jobs.c.project_id == project_id)
        with self.database.read() as connection:
            found = {Status(status): count for status, count in connection.execute(query)}
        return {status: found.get(status, 0) for status in Status}

    def move(
        self,
        job_id: str,
        to: Status,
        event: Event,
        *,
        sources: Collection[Status] | None = None,
        lease: str | None = None,
        error: JobError | None = None,
        fine_tuned_model: str | None = None,
        actor: Mapping[str, Any] | None = None,
    ) -> Job:
        """Compare-and-set to another state, with the event and the webhooks that belong to it, all or nothing.

        Raises ConflictError when the job stands where this move is not allowed, LeaseLostError when `lease` is
        given and another driver holds the job. What an `actor` does goes to the audit log.
        """
        with self.database.write() as connection:
            job = self.move_in(
                connection,
                job_id,
                to,
                event,
                sources=sources,
                lease=lease,
                error=error,
                fine_tuned_model=fine_tuned_model,
            )
            if actor is not None:
                kind = f"fine_tuning.job.{_DEEDS.get(to, to)}"
                self.audit.append_in(connection, kind, actor, job.project_id, {"id": job_id})
            return job

    def move_in(
        self,
        connection: Connection,
        job_id: str,
        to: Status,
        event: Event,
        *,
        sources: Collection[Status] | None = None,
        lease: str | None = None,
        error: JobError | None = None,
        fine_tuned_model: str | None = None,
    ) -> Job:
        """`move` as a part of a larger transaction."""
        now = self.database.now()
        allowed = {status for status, targets in TRANSITIONS.items() if to in targets}
        values: dict[str, Any] = {"status": to}
        if to is Status.QUEUED:
            values |= {"queued_at": now, "estimated_finish": None}
        if to is Status.RUNNING:
            values |= {"started_at": now}
        if to in TERMINAL:
            values |= {"finished_at": now, "estimated_finish": None}
        if to in TERMINAL or to in (Status.QUEUED, Status.PAUSED):
            values |= {"failures": 0}
        if error is not None:
            values["error"] = asdict(error)
        if fine_tuned_model is not None:
            values["fine_tuned_model"] = fine_tuned_model
        statement = update(jobs).where(jobs.c.id == job_id, jobs.c.status.in_(allowed & set(sources or allowed)))
        if lease is not None:
            statement = statement.where(jobs.c.lease_owner == lease)
        if connection.execute(statement.values(**values)).rowcount == 0:
            raise _refusal(_get(connection, job_id), to, lease)
        self._append(connection, job_id, event)
        job = _get(connection, job_id)
        if to in TERMINAL:
            webhooks.enqueue(connection, now, job.project_id, f"fine_tuning.job.{to}", job_id)
        return job

    def record_step(
        self,
        job_id: str,
        lease: str,
        name: str,
        result: Mapping[str, Any],
        *,
        event: Event | None = None,
        result_files: Sequence[str] = (),
        trained_tokens: int | None = None,
    ) -> None:
        """Write down that a step is done; whoever runs the job later takes the result from here."""
        with self.database.write() as connection:
            job = self.held(connection, job_id, lease)
            connection.execute(
                insert(job_steps).values(job_id=job_id, name=name, result=dict(result), finished_at=self.database.now())
            )
            files = list(dict.fromkeys((*job.result_files, *result_files)))
            values: dict[str, Any] = {"result_files": files, "failures": 0}
            if trained_tokens is not None:
                values["trained_tokens"] = trained_tokens
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(**values))
            if event is not None:
                self._append(connection, job_id, event)

    def steps(self, job_id: str) -> dict[str, dict[str, Any]]:
        """The results of the finished steps by name."""
        query = select(job_steps.c.name, job_steps.c.result).where(job_steps.c.job_id == job_id)
        with self.database.read() as connection:
            return {row.name: row.result for row in connection.execute(query)}

    def append(
        self, job_id: str, event: Event, lease: str | None = None, estimated_finish: float | None = None
    ) -> None:
        """Add an event; with a lease, only while its holder still owns a job that has not ended."""
        with self.database.write() as connection:
            if lease is not None:
                self.held(connection, job_id, lease)
            if estimated_finish is not None:
                connection.execute(update(jobs).where(jobs.c.id == job_id).values(estimated_finish=estimated_finish))
            self._append(connection, job_id, event)

    def events(self, job_id: str, *, after: str | None = None, limit: int = 20) -> Page[StoredEvent]:
        """A job's log, newest first."""
        query = select(job_events).where(job_events.c.job_id == job_id)
        with self.database.read() as connection:
            return page(connection, job_events, query, _event, after=after, limit=limit)

    def add_checkpoint(self, job_id: str, lease: str, step_number: int, uri: str, metrics: Mapping[str, float]) -> None:
        """Write down a checkpoint; saving the same step again replaces where it lies."""
        now = self.database.now()
        with self.database.write() as connection:
            self.held(connection, job_id, lease)
            statement = self._insert(job_checkpoints).values(
                id=ids.derived_id(ids.CHECKPOINT, job_id, str(step_number)),
                job_id=job_id,
                step_number=step_number,
                uri=uri,
                metrics=dict(metrics),
                created_at=now,
            )
            connection.execute(
                statement.on_conflict_do_update(
                    index_elements=["job_id", "step_number"],
                    set_={"uri": statement.excluded.uri, "metrics": statement.excluded.metrics},
                )
            )

    def checkpoints(self, job_id: str, *, after: str | None = None, limit: int = 10) -> Page[Checkpoint]:
        """A job's checkpoints, newest first."""
        query = select(job_checkpoints).where(job_checkpoints.c.job_id == job_id)
        with self.database.read() as connection:
            return page(connection, job_checkpoints, query, _checkpoint, after=after, limit=limit)

    def held(self, connection: Connection, job_id: str, lease: str) -> Job:
        """The job, locked for this transaction, if `lease` still owns it and it has not ended."""
        row = connection.execute(select(*_COLUMNS).where(jobs.c.id == job_id).with_for_update()).first()
        if row is None:
            raise NotFoundError("fine-tuning job", job_id)
        job = _job(row)
        if job.lease_owner != lease:
            raise LeaseLostError(f"{job_id}: another driver holds this job")
        if job.status in TERMINAL:
            raise StoppedError(f"{job_id}: the job was {job.status}")
        return job

    def queue_position(self, job: Job) -> int | None:
        """How many queued jobs, of all projects, were queued no later than this one; None when it is not queued."""
        if job.status is not Status.QUEUED:
            return None
        query = select(func.count()).where(jobs.c.status == Status.QUEUED, jobs.c.queued_at <= job.queued_at)
        with self.database.read() as connection:
            return int(connection.execute(query).scalar_one())

    def _check_quota(self, connection: Connection, project_id: str, most: int) -> None:
        self.database.serialize(connection, f"jobs of {project_id}")
        unfinished = select(func.count()).where(jobs.c.project_id == project_id, jobs.c.status.not_in(TERMINAL))
        if connection.execute(unfinished).scalar_one() >= most:
            raise QuotaError(f"The project has {most} unfinished jobs, as many as it may have.")

    def _append(self, connection: Connection, job_id: str, event: Event) -> None:
        statement = self._insert(job_events).values(
            id=ids.new_id(ids.EVENT),
            job_id=job_id,
            key=event.key,
            level=event.level,
            type=event.type,
            message=event.message,
            data=dict(event.data),
            created_at=self.database.now(),
        )
        connection.execute(statement.on_conflict_do_nothing(index_elements=["job_id", "key"]))

    def _insert(self, table: Any) -> Any:
        return (sqlite if self.database.is_sqlite else postgresql).insert(table)


def _get(connection: Connection, job_id: str) -> Job:
    row = connection.execute(select(*_COLUMNS).where(jobs.c.id == job_id)).first()
    if row is None:
        raise NotFoundError("fine-tuning job", job_id)
    return _job(row)


def _refusal(job: Job, to: Status, lease: str | None) -> Exception:
    if lease is not None and job.lease_owner != lease:
        return LeaseLostError(f"{job.id}: another driver holds this job")
    return ConflictError(f"Job {job.id} is {job.status} and cannot become {to}.", f"job_not_{_ADJECTIVE.get(to, to)}")


_DEEDS = {Status.QUEUED: "resumed", Status.VALIDATING: "resumed"}

_ADJECTIVE = {
    Status.CANCELLED: "cancellable",
    Status.PAUSED: "pausable",
    Status.QUEUED: "resumable",
    Status.VALIDATING: "resumable",
}


def _job(row: Any) -> Job:
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


def _event(row: Any) -> StoredEvent:
    return StoredEvent(row.id, row.created_at, Event(row.message, row.level, row.type, row.data, row.key))


def _checkpoint(row: Any) -> Checkpoint:
    return Checkpoint(row.id, row.job_id, row.step_number, row.uri, row.metrics, row.created_at)
