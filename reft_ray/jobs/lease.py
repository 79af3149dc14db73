"""Scheduling and ownership of jobs: fair slots, launches claimed once, leases renewed by drivers."""

from __future__ import annotations

from collections import Counter

from pydantic import Field
from sqlalchemy import or_, select, update

from reft_ray.jobs.database import Database
from reft_ray.jobs.errors import LeaseLostError
from reft_ray.jobs.job import ACTIVE, Event, Job, Status
from reft_ray.jobs.job_rows import locked
from reft_ray.jobs.job_store import JobStore
from reft_ray.jobs.tables import jobs
from reft_ray.settings import Settings

LEASE_SECONDS = 30.0
"""A driver without a heartbeat for this long is presumed dead."""

START_SECONDS = 60.0
"""How long a launched driver may take to acquire its lease, unless it waits for resources."""


class Slots(Settings):
    """How many jobs may run at once, in total and per project."""

    training: int = Field(1, ge=1)
    validating: int = Field(2, ge=1)
    validating_per_project: int = Field(1, ge=1)
    training_per_project: int = Field(1, ge=1)


class Leases:
    """Ownership of jobs: the holder of a job's lease is its only driver."""

    def __init__(self, store: JobStore, lease_seconds: float = LEASE_SECONDS, start_seconds: float = START_SECONDS):
        self.store = store
        self.lease_seconds = lease_seconds
        self.start_seconds = start_seconds
        self._ahead: dict[tuple[str, float], float] = {}

    @property
    def database(self) -> Database:
        """The database of the records."""
        return self.store.database

    def grant(self, slots: Slots) -> list[Job]:
        """Move queued jobs to `running` while there are slots.

        The next slot goes to the project with the fewest running jobs, and among those to the job that has waited
        longest, so a project with a hundred queued jobs does not block the others.
        """
        granted: list[tuple[Job, Job]] = []
        with self.database.write() as connection:
            self.database.serialize(connection, "slots")
            active = connection.execute(select(jobs.c.project_id).where(jobs.c.status == Status.RUNNING)).scalars()
            running = Counter(active)
            waiting = list(
                connection.execute(
                    select(jobs.c.id, jobs.c.project_id)
                    .where(jobs.c.status == Status.QUEUED)
                    .order_by(jobs.c.queued_at, jobs.c.seq)
                )
            )
            while running.total() < slots.training:
                eligible = [row for row in waiting if running[row.project_id] < slots.training_per_project]
                if not eligible:
                    break
                chosen = min(eligible, key=lambda row: running[row.project_id])
                waiting.remove(chosen)
                before = locked(connection, chosen.id)
                if before.status is not Status.QUEUED:
                    continue  # cancelled or paused since the list was read
                started = Event("Fine-tuning job started")
                running[chosen.project_id] += 1
                granted.append((before, self.store.move_in(connection, before, Status.RUNNING, started)))
        for before, job in granted:
            self.store.observe(before, job)
        return [job for _, job in granted]

    def is_driven(self, job: Job) -> bool:
        """Whether a driver holds the job, or was launched recently enough to still be starting."""
        now = self.database.now()
        if job.lease_owner is not None:
            if job.lease_until is None or job.lease_until <= now + self.lease_seconds:
                return job.lease_until is not None and job.lease_until > now
            # Its driver's clock is ahead, or ours was set back: it is alive if it renews the lease within our time.
            self._ahead = {key: since for key, since in self._ahead.items() if now < since + 10 * self.lease_seconds}
            return now < self._ahead.setdefault((job.id, job.lease_until), now) + self.lease_seconds
        return job.launched_at is not None and job.launched_at + self.start_seconds > now

    def claim(self, job: Job) -> int | None:
        """Claim the launch of a driver for this state of the job: the new attempt's number, or None if too late."""
        statement = (
            update(jobs)
            .where(jobs.c.id == job.id, jobs.c.attempt == job.attempt, jobs.c.status.in_(ACTIVE))
            .where(jobs.c.lease_owner.is_(None) if job.lease_owner is None else jobs.c.lease_owner == job.lease_owner)
            .values(
                attempt=job.attempt + 1,
                failures=jobs.c.failures + 1,
                launched_at=self.database.now(),
                lease_owner=None,
                lease_until=None,
                handle=None,
            )
        )
        with self.database.write() as connection:
            return job.attempt + 1 if connection.execute(statement).rowcount else None

    def set_handle(self, job_id: str, attempt: int, handle: str | None) -> None:
        """Store the handle of an attempt's driver, unless there is a later attempt."""
        with self.database.write() as connection:
            connection.execute(update(jobs).where(jobs.c.id == job_id, jobs.c.attempt == attempt).values(handle=handle))

    def forget(self, job: Job) -> None:
        """Remove an ended driver from the record of a job that needs none."""
        statement = (
            update(jobs)
            .where(jobs.c.id == job.id, jobs.c.attempt == job.attempt, jobs.c.status.not_in(ACTIVE))
            .values(handle=None, lease_owner=None, lease_until=None, launched_at=None)
        )
        with self.database.write() as connection:
            connection.execute(statement)

    def acquire(self, job_id: str, attempt: int, owner: str) -> Job:
        """Become the job's owner (called by the driver). Raises LeaseLostError unless this attempt is current."""
        statement = (
            update(jobs)
            .where(jobs.c.id == job_id, jobs.c.attempt == attempt, jobs.c.status.in_(ACTIVE))
            .where(or_(jobs.c.lease_owner.is_(None), jobs.c.lease_owner == owner))
            .values(lease_owner=owner, lease_until=self.database.now() + self.lease_seconds)
        )
        with self.database.write() as connection:
            if connection.execute(statement).rowcount == 0:
                raise LeaseLostError(f"{job_id}: attempt {attempt} is no longer current")
        return self.store.get(job_id)

    def renew(self, job_id: str, owner: str) -> Job:
        """Renew the lease (the driver's heartbeat). Raises LeaseLostError when another driver took over."""
        statement = (
            update(jobs)
            .where(jobs.c.id == job_id, jobs.c.lease_owner == owner)
            .values(lease_until=self.database.now() + self.lease_seconds)
        )
        with self.database.write() as connection:
            if connection.execute(statement).rowcount == 0:
                raise LeaseLostError(f"{job_id}: another driver holds this job")
        return self.store.get(job_id)

    def release(self, job_id: str, owner: str) -> None:
        """Release the lease (a driver that stops cleanly), so the next launch does not count as a failure."""
        statement = (
            update(jobs)
            .where(jobs.c.id == job_id, jobs.c.lease_owner == owner)
            .values(lease_owner=None, lease_until=None, launched_at=None, failures=0)
        )
        with self.database.write() as connection:
            connection.execute(statement)
