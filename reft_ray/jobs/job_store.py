"""Jobs, their events, checkpoints and finished steps in SQL. Every status change is compare-and-set."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, Text, cast, exists, false, func, insert, select, update

from reft_ray.core.errors import StoppedError
from reft_ray.jobs import ids, webhooks
from reft_ray.jobs.audit import AuditLog
from reft_ray.jobs.database import Database
from reft_ray.jobs.errors import ConflictError, InvalidError, LeaseLostError, NotFoundError, QuotaError
from reft_ray.jobs.job import TERMINAL, TRANSITIONS, Checkpoint, Event, Job, JobError, JobSpec, Status, StoredEvent
from reft_ray.jobs.job_rows import COLUMNS, append_event, checkpoint_of, event_of, fetch, job_of, locked, upsert
from reft_ray.jobs.paging import Page, page
from reft_ray.jobs.tables import job_checkpoints, job_events, job_steps, jobs
from reft_ray.telemetry import catalog
from reft_ray.telemetry.recorder import NullRecorder, Recorder

MAX_METADATA = 16


class JobStore:
    """The records of all jobs."""

    def __init__(self, database: Database, recorder: Recorder | None = None) -> None:
        self.database = database
        self.recorder = recorder or NullRecorder()
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
        request_key: str | None = None,
        seeded: bool = False,
        admit: Callable[[Connection], None] = lambda connection: None,
    ) -> Job:
        """Create a job in `validating_files`, with its first event.

        The same `request_key` of a project returns the same job, so a request whose response was lost can be repeated.
        `seeded`: the request named the seed, so a repeated one must name the same. `admit` runs in the transaction that
        creates the job and raises where it must not be created.
        Raises QuotaError when the project has `max_unfinished` unfinished jobs.
        """
        job_id = ids.derived_id(ids.JOB, project_id, request_key) if request_key else ids.new_id(ids.JOB)
        with self.database.write() as connection:
            if request_key is not None:
                self.database.serialize(connection, job_id)
                row = connection.execute(select(*COLUMNS).where(jobs.c.id == job_id)).first()
                if row is not None:
                    return _repeated(job_of(row), spec, metadata, seeded)
            admit(connection)
            if max_unfinished is not None:
                self._check_quota(connection, project_id, max_unfinished)
            connection.execute(
                insert(jobs).values(
                    id=job_id,
                    organization_id=organization_id,
                    project_id=project_id,
                    status=Status.VALIDATING,
                    spec=spec.to_json(),
                    model=spec.model,
                    training_file=spec.training_file,
                    validation_file=spec.validation_file,
                    metadata=dict(metadata),
                    created_at=self.database.now(),
                    result_files=[],
                    attempt=0,
                    failures=0,
                )
            )
            append_event(
                connection, job_id, Event(f"Created fine-tuning job: {job_id}", key="created"), self.database.now()
            )
            if actor is not None:
                self.audit.append_in(connection, "fine_tuning.job.created", actor, project_id, {"id": job_id})
            job = fetch(connection, job_id)
        self.recorder.count(catalog.JOB_TRANSITIONS, from_status="created", to_status=str(job.status))
        return job

    def get(self, job_id: str, project_id: str | None = None) -> Job:
        """Get a job. Raises NotFoundError, also for a job of another project than `project_id`."""
        with self.database.read() as connection:
            job = fetch(connection, job_id)
        if project_id is not None and job.project_id != project_id:
            raise NotFoundError("fine-tuning job", job_id)
        return job

    def list(
        self,
        project_id: str | None,
        *,
        after: str | None = None,
        limit: int = 20,
        metadata: Mapping[str, str] | None = None,
        without_metadata: bool = False,
    ) -> Page[Job]:
        """A project's jobs, or those of all projects, newest first, optionally only those with the given metadata."""
        query = select(*COLUMNS)
        if project_id is not None:
            query = query.where(jobs.c.project_id == project_id)
        if len(metadata or {}) > MAX_METADATA:
            raise InvalidError(f"metadata: a job has up to {MAX_METADATA} pairs.", "metadata")
        if metadata:
            query = query.where(*self._having(metadata))
        if without_metadata:
            query = query.where(func.length(cast(jobs.c.metadata, Text)) <= len("{}"))
        with self.database.read() as connection:
            return page(connection, jobs, query, job_of, after=after, limit=limit)

    def _having(self, metadata: Mapping[str, str]) -> Sequence[ColumnElement[bool]]:
        """Conditions on the pairs. No key is part of a JSON path, in which SQLite gives characters a meaning."""
        if any("\0" in text for pair in metadata.items() for text in pair):
            return [false()]  # neither database stores it
        if not self.database.is_sqlite:
            return [jobs.c.metadata[key].as_string() == value for key, value in metadata.items()]
        each = func.json_each(jobs.c.metadata).table_valued("key", "value")
        return [
            exists(select(1).select_from(each).where(each.c.key == key, each.c.value == value))
            for key, value in metadata.items()
        ]

    def with_status(self, statuses: Collection[Status]) -> Sequence[Job]:
        """Jobs of all projects with these statuses, oldest first."""
        query = select(*COLUMNS).where(jobs.c.status.in_(statuses)).order_by(jobs.c.seq)
        with self.database.read() as connection:
            return [job_of(row) for row in connection.execute(query)]

    def with_handle(self) -> Sequence[Job]:
        """Jobs of all projects whose driver has a handle."""
        query = select(*COLUMNS).where(jobs.c.handle.is_not(None)).order_by(jobs.c.seq)
        with self.database.read() as connection:
            return [job_of(row) for row in connection.execute(query)]

    def to_clean(self) -> Sequence[Job]:
        """Finished jobs without a driver whose temporary files may still exist."""
        query = select(*COLUMNS).where(
            jobs.c.status.in_(TERMINAL), jobs.c.cleaned_at.is_(None), jobs.c.handle.is_(None)
        )
        with self.database.read() as connection:
            return [job_of(row) for row in connection.execute(query.order_by(jobs.c.seq).limit(1000))]

    def cleaned(self, job_id: str) -> None:
        """Record that a finished job's temporary files are removed."""
        with self.database.write() as connection:
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(cleaned_at=self.database.now()))

    def counts(self) -> dict[tuple[str, Status], int]:
        """The number of jobs by project and status, with every status of each project that has jobs."""
        query = select(jobs.c.project_id, jobs.c.status, func.count()).group_by(jobs.c.project_id, jobs.c.status)
        with self.database.read() as connection:
            found = {(project, Status(status)): count for project, status, count in connection.execute(query)}
        projects = {project for project, _ in found}
        return {(project, status): found.get((project, status), 0) for project in projects for status in Status}

    def move(
        self,
        job_id: str,
        to: Status,
        event: Event,
        *,
        sources: Collection[Status] | None = None,
        lease: str | None = None,
        error: JobError | None = None,
        actor: Mapping[str, Any] | None = None,
    ) -> Job:
        """Change the status atomically (compare-and-set), with its event and webhooks.

        Raises ConflictError when the current status does not allow it, LeaseLostError when `lease` is given and
        another driver holds the job. With an `actor`, the audit log gets an entry.
        """
        with self.database.write() as connection:
            before = locked(connection, job_id)
            job = self.move_in(connection, before, to, event, sources=sources, lease=lease, error=error)
            if actor is not None:
                kind = f"fine_tuning.job.{_AUDITED.get(to, to)}"
                self.audit.append_in(connection, kind, actor, job.project_id, {"id": job_id})
        self.observe(before, job)
        return job

    def steer(self, job: Job, verb: Literal["pause", "resume", "cancel"], actor: Mapping[str, Any]) -> Job:
        """Pause, resume or cancel a job for a person; one that was queued or running resumes into the queue."""
        match verb:
            case "pause":
                return self.move(job.id, Status.PAUSED, Event("Fine-tuning job paused"), actor=actor)
            case "resume":
                to = Status.VALIDATING if job.queued_at is None else Status.QUEUED
                return self.move(job.id, to, Event("Fine-tuning job resumed"), sources={Status.PAUSED}, actor=actor)
            case "cancel":
                return self.move(job.id, Status.CANCELLED, Event("Fine-tuning job cancelled"), actor=actor)

    def move_in(
        self,
        connection: Connection,
        before: Job,
        to: Status,
        event: Event,
        *,
        sources: Collection[Status] | None = None,
        lease: str | None = None,
        error: JobError | None = None,
        fine_tuned_model: str | None = None,
    ) -> Job:
        """`move` within a transaction that has locked the job; call `observe` after the commit."""
        if lease is not None and before.lease_owner != lease:
            raise LeaseLostError(f"{before.id}: another driver holds this job")
        if to not in TRANSITIONS[before.status] or (sources is not None and before.status not in sources):
            raise ConflictError(
                f"Job {before.id} is {before.status} and cannot become {to}.",
                f"job_not_{_ADJECTIVE.get(to, to)}",
            )
        now = self.database.now()
        values: dict[str, Any] = {"status": to}
        if to is Status.QUEUED:
            values |= {"queued_at": now, "estimated_finish": None}
        if to is Status.RUNNING:
            values |= {"started_at": now}
        if to in TERMINAL:
            values |= {"finished_at": now, "estimated_finish": None}
        if to is not Status.RUNNING:
            values |= {"failures": 0, "launched_at": None}
        if error is not None:
            values["error"] = asdict(error)
        if fine_tuned_model is not None:
            values["fine_tuned_model"] = fine_tuned_model
        connection.execute(update(jobs).where(jobs.c.id == before.id, jobs.c.status == before.status).values(**values))
        append_event(connection, before.id, event, now)
        if to in TERMINAL:
            webhooks.enqueue(connection, now, before.project_id, f"fine_tuning.job.{to}", before.id)
        return fetch(connection, before.id)

    def observe(self, before: Job, after: Job) -> None:
        """Record the metrics of a committed status change."""
        record = self.recorder
        record.count(catalog.JOB_TRANSITIONS, from_status=str(before.status), to_status=str(after.status))
        if after.status is Status.RUNNING and before.queued_at is not None:
            record.observe(catalog.JOB_QUEUE_SECONDS, max(0.0, self.database.now() - before.queued_at))
        if after.status in TERMINAL:
            record.observe(
                catalog.JOB_SECONDS, max(0.0, self.database.now() - after.created_at), status=str(after.status)
            )
        if after.error is not None:
            record.count(catalog.JOB_FAILURES, code=after.error.code, project=after.project_id)

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
        """Record a finished step; later drivers use its recorded result."""
        with self.database.write() as connection:
            job = held(connection, job_id, lease)
            self.record_step_in(connection, job, name, result)
            files = list(dict.fromkeys((*job.result_files, *result_files)))
            values: dict[str, Any] = {"result_files": files, "failures": 0}
            if trained_tokens is not None:
                values["trained_tokens"] = trained_tokens
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(**values))
            if event is not None:
                append_event(connection, job_id, event, self.database.now())

    def record_step_in(self, connection: Connection, job: Job, name: str, result: Mapping[str, Any]) -> None:
        """`record_step` within a transaction that has locked the job."""
        connection.execute(
            insert(job_steps).values(job_id=job.id, name=name, result=dict(result), finished_at=self.database.now())
        )

    def steps(self, job_id: str) -> dict[str, dict[str, Any]]:
        """The results of finished steps by name."""
        query = select(job_steps.c.name, job_steps.c.result).where(job_steps.c.job_id == job_id)
        with self.database.read() as connection:
            return {row.name: row.result for row in connection.execute(query)}

    def append(
        self, job_id: str, event: Event, lease: str | None = None, estimated_finish: float | None = None
    ) -> None:
        """Add an event; with a lease, only while it is valid and the job has not ended."""
        with self.database.write() as connection:
            if lease is not None:
                held(connection, job_id, lease)
            if estimated_finish is not None:
                connection.execute(update(jobs).where(jobs.c.id == job_id).values(estimated_finish=estimated_finish))
            append_event(connection, job_id, event, self.database.now())

    def events(self, job_id: str, *, after: str | None = None, limit: int = 20) -> Page[StoredEvent]:
        """A job's events, newest first."""
        query = select(job_events).where(job_events.c.job_id == job_id)
        with self.database.read() as connection:
            return page(connection, job_events, query, event_of, after=after, limit=limit)

    def add_checkpoint(self, job_id: str, lease: str, step_number: int, uri: str, metrics: Mapping[str, float]) -> None:
        """Record a checkpoint; saving the same step again replaces it."""
        now = self.database.now()
        with self.database.write() as connection:
            held(connection, job_id, lease)
            statement = upsert(connection, job_checkpoints).values(
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
            # Progress: earlier crashes do not count any more.
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(failures=0))

    def checkpoints(self, job_id: str, *, after: str | None = None, limit: int = 10) -> Page[Checkpoint]:
        """A job's checkpoints, newest first."""
        query = select(job_checkpoints).where(job_checkpoints.c.job_id == job_id)
        with self.database.read() as connection:
            return page(connection, job_checkpoints, query, checkpoint_of, after=after, limit=limit)

    def queue_position(self, job: Job) -> int | None:
        """The job's position in the queue of all projects, from 1; None when it is not queued."""
        if job.status is not Status.QUEUED:
            return None
        query = select(func.count()).where(jobs.c.status == Status.QUEUED, jobs.c.queued_at <= job.queued_at)
        with self.database.read() as connection:
            return int(connection.execute(query).scalar_one())

    def _check_quota(self, connection: Connection, project_id: str, most: int) -> None:
        self.database.serialize(connection, f"jobs of {project_id}")
        unfinished = select(func.count()).where(jobs.c.project_id == project_id, jobs.c.status.not_in(TERMINAL))
        if connection.execute(unfinished).scalar_one() >= most:
            raise QuotaError(f"The project has {most} unfinished jobs, its limit.", "jobs")


def held(connection: Connection, job_id: str, lease: str) -> Job:
    """Lock the job for this transaction. Raises LeaseLostError or StoppedError unless `lease` holds a running job."""
    job = locked(connection, job_id)
    if job.lease_owner != lease:
        raise LeaseLostError(f"{job_id}: another driver holds this job")
    if job.status in TERMINAL:
        raise StoppedError(f"{job_id}: the job was {job.status}")
    return job


def _repeated(job: Job, spec: JobSpec, metadata: Mapping[str, str], seeded: bool) -> Job:
    # Each request without a seed draws a different one.
    same = spec if seeded else replace(spec, seed=job.spec.seed)
    if same != job.spec or dict(metadata) != dict(job.metadata):
        raise ConflictError(
            f"The idempotency key was used for a different request (job {job.id}).", "idempotency_conflict"
        )
    return job


_AUDITED = {Status.QUEUED: "resumed", Status.VALIDATING: "resumed"}

_ADJECTIVE = {
    Status.CANCELLED: "cancellable",
    Status.PAUSED: "pausable",
    Status.QUEUED: "resumable",
    Status.VALIDATING: "resumable",
}
