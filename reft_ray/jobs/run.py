"""A driver's access to its job. Every write checks the lease, so a driver that lost it changes nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar

from sqlalchemy import Connection

from reft_ray.core.errors import StoppedError
from reft_ray.jobs import ids
from reft_ray.jobs.errors import LeaseLostError, QuotaError, TooLargeError
from reft_ray.jobs.files import RESULTS, FileStore, job_key, scratch_key
from reft_ray.jobs.job import Checkpoint, Event, Job, JobError, Status
from reft_ray.jobs.job_rows import append_event
from reft_ray.jobs.job_store import held
from reft_ray.jobs.lease import Leases
from reft_ray.jobs.models import ModelStore
from reft_ray.jobs.releases import Release, ReleaseState, request_in
from reft_ray.jobs.results import Export, finite, record_of, result_of
from reft_ray.jobs.review import FiledRow, Kind, Review
from reft_ray.jobs.review_queue import ReviewQueue, waits_in
from reft_ray.telemetry.recorder import Recorder

T = TypeVar("T")

QUOTA_EXHAUSTED = "insufficient_quota"

GATE_SHARE = 0.1
"""Assumed time of evaluation and export, as a share of the training time."""


class JobFailedError(Exception):
    """The job cannot succeed; `error` is the reason for the user."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.error = JobError(code, message, param)


class JobRun:
    """The job, as its lifecycle, its steps and its driver use it."""

    def __init__(self, job: Job, leases: Leases, owner: str, files: FileStore) -> None:
        self.job = job
        self.files = files
        self._leases = leases
        self._store = leases.store
        self._owner = owner
        self._done = self._store.steps(job.id)
        self._stop = threading.Event()
        self._lost = False
        self._pace: tuple[float, int] | None = None

    @property
    def workspace(self) -> str:
        """The URI of the job's artefacts, which are kept when it succeeds."""
        return self.files.content.uri(job_key(self.job.project_id, self.job.id))

    @property
    def scratch(self) -> str:
        """The URI of temporary artefacts, such as copies of rows, which are removed when the job ends."""
        return self.files.content.uri(scratch_key(self.job.project_id, self.job.id))

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The checkpoints so far, newest first; training resumes from the first."""
        return self._store.checkpoints(self.job.id, limit=1000).items

    @property
    def metrics_history(self) -> list[Mapping[str, Any]]:
        """The data of all metrics events so far, also of earlier drivers, ordered by step."""
        found: list[Mapping[str, Any]] = []
        after = None
        while True:
            page = self._store.events(self.job.id, after=after, limit=1000)
            found += [item.event.data for item in page.items if item.event.type == "metrics"]
            if not page.has_more:
                return sorted(found, key=lambda data: data["step"])
            after = page.items[-1].id

    # For the steps

    @property
    def recorder(self) -> Recorder:
        """The metrics recorder for the steps."""
        return self._store.recorder

    def should_stop(self) -> bool:
        """Whether the job was cancelled or paused, or has another driver. Steps call it between batches.

        When it is True, a step saves its state and raises StoppedError.
        """
        return self._stop.is_set()

    def wait(self, seconds: float) -> bool:
        """Sleep until `seconds` have passed or the step should stop; returns `should_stop()`."""
        return self._stop.wait(seconds)

    def event(
        self,
        message: str,
        *,
        level: Literal["info", "warn", "error"] = "info",
        type: str = "message",
        data: Mapping[str, Any] | None = None,
        key: str | None = None,
    ) -> None:
        """Add an event to the job's log: numbers and ids, never row texts. An event with a key is added once."""
        self._store.append(self.job.id, Event(message, level, type, data or {}, key), self._owner)

    def metrics(self, step: int, total_steps: int, values: Mapping[str, float]) -> None:
        """Report training metrics, e.g. `train_loss`; also updates the ETA."""
        named = {"training": "train_loss", "validation": "valid_loss"}
        losses = "".join(f", {name} loss={values[key]:.2f}" for name, key in named.items() if key in values)
        data = {"step": step, "total_steps": total_steps, **finite(values)}
        event = Event(f"Step {step}/{total_steps}{losses}", type="metrics", data=data, key=f"train/{step}")
        self._store.append(self.job.id, event, self._owner, self._estimated_finish(step, total_steps))

    def checkpoint(self, step: int, uri: str, metrics: Mapping[str, float]) -> None:
        """Report the complete checkpoint of `step` at `uri`."""
        self._store.add_checkpoint(self.job.id, self._owner, step, uri, finite(dict(metrics)))

    def save_file(
        self,
        name: str,
        chunks: Iterable[bytes],
        *,
        parent_id: str | None = None,
        expires_after: int | None = None,
        purpose: str = RESULTS,
    ) -> str:
        """Store a result file, replacing one with this name; returns its id. It is deleted with its parent.

        Raises JobFailedError when the quota is exhausted: a retry would not help.
        """
        try:
            record = self.files.create(
                self.job.project_id,
                name,
                purpose,
                chunks,
                parent_id=parent_id,
                expires_after=expires_after,
                file_id=ids.derived_id(ids.FILE, self.job.id, name),
            )
        except (QuotaError, TooLargeError) as full:
            raise JobFailedError(
                QUOTA_EXHAUSTED,
                f"The job failed because its file {name} could not be stored. {full} "
                "Delete files of the project and create the job again.",
            ) from None
        return record.id

    def file_reviews(self, rows: Iterable[FiledRow]) -> None:
        """Put rows into the queue of people's decisions; repeating it adds nothing."""
        ReviewQueue(self._store).file(self.job, rows)

    def decisions(self) -> list[Review]:
        """What people have decided about the job's withheld rows, in row order."""
        decided = ReviewQueue(self._store).decided(self.job.id)
        return [review for review in decided if review.kind is Kind.WITHHELD]

    # For the lifecycle

    def ask_people(self, event: Event) -> None:
        """Pause, with this event the first time, while a withheld row waits for a person. Raises StoppedError then.

        The last decision locks the job too, so it either precedes the pause, or lets the paused job continue.
        """
        with self._store.database.write() as connection:
            before = self._held(connection)
            if not waits_in(connection, before.id):
                return
            if self.done("ask"):
                event = Event("Withheld examples still wait for a person's decision", level="warn")
            else:
                self._store.record_step_in(connection, before, "ask", {})
                self._done["ask"] = {}
            after = self._store.move_in(connection, before, Status.PAUSED, event)
        self._store.observe(before, after)
        raise StoppedError(f"{self.job.id}: waits for people")

    def await_release(self) -> Release:
        """The decision of people about a model that failed the gate. Raises StoppedError until there is one."""
        with self._store.database.write() as connection:
            before = self._held(connection)
            found = request_in(connection, before, self._store.database.now())
            after = None
            if found.state in (ReleaseState.WAITING, ReleaseState.SIGNED):
                waits = Event("The model did not pass the release gate and waits for two signatures", level="warn")
                after = self._store.move_in(connection, before, Status.PAUSED, waits)
        if after is not None:
            self._store.observe(before, after)
            raise StoppedError(f"{self.job.id}: waits for signatures")
        return found

    def done(self, name: str) -> bool:
        """Whether a step is recorded as finished."""
        return name in self._done

    def once(
        self,
        name: str,
        kind: type[T],
        work: Callable[[], T],
        *,
        event_of: Callable[[T], Event] | None = None,
        result_files: Callable[[T], Iterable[str | None]] = lambda result: (),
        trained_tokens: Callable[[T], int | None] = lambda result: None,
    ) -> T:
        """The recorded result of a step; without one, do the work and record its result."""
        if name in self._done:
            result: T = result_of(kind, self._done[name])
            return result
        self.check()
        result = work()
        document = record_of(result)
        self._store.record_step(
            self.job.id,
            self._owner,
            name,
            document,
            event=event_of(result) if event_of else None,
            result_files=[file for file in result_files(result) if file is not None],
            trained_tokens=trained_tokens(result),
        )
        self._done[name] = document
        return result

    def check(self) -> None:
        """Raise StoppedError unless this driver may continue."""
        job = self._store.get(self.job.id)
        if job.lease_owner != self._owner or job.status is not self.job.status:
            self._stop.set()
        if self._stop.is_set():
            raise StoppedError(f"{self.job.id}: asked to stop")

    def park(self, status: Status, event: Event) -> None:
        """Set a status in which the job waits, and raise StoppedError."""
        self._move(status, event)
        raise StoppedError(f"{self.job.id}: waits as {status}")

    def fail(self, error: JobError) -> None:
        """End the job with an error."""
        self._move(Status.FAILED, Event(error.message, level="error", data={"code": error.code}), error=error)

    def succeed(self, export: Export) -> None:
        """End the job with a model, which becomes visible in the same transaction."""
        name = self.job.model_name
        with self._store.database.write() as connection:
            before = held(connection, self.job.id, self._owner)
            created = Event(f"New fine-tuned model created: {name}")
            append_event(connection, self.job.id, created, self._store.database.now())
            done = Event("The job has successfully completed")
            after = self._store.move_in(
                connection, before, Status.SUCCEEDED, done, sources={Status.RUNNING}, fine_tuned_model=name
            )
            ModelStore(self._store.database).register_in(connection, after, export.uri)
        self._store.observe(before, after)

    # For the driver

    def heartbeat(self) -> bool:
        """Renew the lease; returns whether to continue."""
        try:
            job = self._leases.renew(self.job.id, self._owner)
        except LeaseLostError:
            self._lost = True
            self._stop.set()
            return False
        if job.status is not self.job.status:
            self._stop.set()
        return not self._stop.is_set()

    @property
    def lost(self) -> bool:
        """Whether another driver took the job over."""
        return self._lost

    def stop(self) -> None:
        """Ask the steps to stop, e.g. because the machine shuts down."""
        self._stop.set()

    def release(self) -> None:
        """Release the lease."""
        self._leases.release(self.job.id, self._owner)

    def _move(self, status: Status, event: Event, error: JobError | None = None) -> None:
        with self._store.database.write() as connection:
            before = self._held(connection)
            after = self._store.move_in(connection, before, status, event, error=error)
        self._store.observe(before, after)

    def _held(self, connection: Connection) -> Job:
        """The locked job. Raises StoppedError where it has another status than this driver's."""
        job = held(connection, self.job.id, self._owner)
        if job.status is not self.job.status:
            raise StoppedError(f"{self.job.id}: the job was {job.status}")
        return job

    def _estimated_finish(self, step: int, total_steps: int) -> float | None:
        """Extrapolate from this driver's first report; None for the first report itself."""
        now = self._store.database.now()
        if self._pace is None:
            self._pace = (now, step)
        started, first = self._pace
        if step <= first:
            return None
        per_step = (now - started) / (step - first)
        return now + (total_steps - step) * per_step + total_steps * per_step * GATE_SHARE
