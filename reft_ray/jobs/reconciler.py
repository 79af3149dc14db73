"""Reconciles the records of jobs with their drivers: starts missing drivers and stops superfluous ones.

Every gateway may run one: all writes are compare-and-set. It keeps no essential state, so a restarted service finds
every job again.
"""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from reft_ray.jobs.errors import ConflictError
from reft_ray.jobs.housekeeping import periodic
from reft_ray.jobs.job import ACTIVE, TERMINAL, Event, Job, JobError, Status
from reft_ray.jobs.job_store import JobStore
from reft_ray.jobs.launcher import Launcher
from reft_ray.jobs.lease import Leases, Slots

logger = logging.getLogger(__name__)

INTERNAL_ERROR = "server_error"


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Timeouts and limits, in seconds except `failures`.

    `stop`: for a cancelled job's driver to exit; `pause`: for a driver to save its state; `backoff`: before the second
    start, doubled for each further one up to `max_backoff`; `failures`: starts without progress before the job fails;
    `resources`: for a launched driver to get its resources.
    """

    stop: float = 15.0
    pause: float = 300.0
    backoff: float = 1.0
    max_backoff: float = 60.0
    failures: int = 5
    resources: float = 6 * 3600.0


@dataclass(slots=True)
class Reconciler:
    """Reconciles all unfinished jobs once per `tick`."""

    store: JobStore
    leases: Leases
    launcher: Launcher
    slots: Slots = field(default_factory=Slots)
    retry_policy: RetryPolicy = field(default_factory=RetryPolicy)
    _lingering: dict[tuple[str, int], float] = field(default_factory=dict)

    def tick(self) -> None:
        """Stop superfluous drivers, grant slots, start missing drivers."""
        unwanted = {(job.id, job.attempt): job for job in self.store.with_handle() if job.status not in ACTIVE}
        # The time limits restart for drivers that are needed again.
        self._lingering = {key: since for key, since in self._lingering.items() if key in unwanted}
        for job in unwanted.values():
            self._collect(job)
        self.leases.grant(self.slots)
        active = self.store.with_status(ACTIVE)
        driven = [job for job in active if self._is_driven(job)]
        validating = Counter(job.project_id for job in driven if job.status is Status.VALIDATING)
        missing = [job for job in active if job not in driven]
        for job in missing:
            if job.status is Status.RUNNING:
                self._start(job)
        waiting = [job for job in missing if job.status is Status.VALIDATING]
        while validating.total() < self.slots.validating:
            most = self.slots.validating_per_project
            eligible = [job for job in waiting if validating[job.project_id] < most]
            if not eligible:
                break
            job = min(eligible, key=lambda job: validating[job.project_id])
            waiting.remove(job)
            if self._start(job):
                validating[job.project_id] += 1

    def background(self, seconds: float = 1.0) -> AbstractContextManager[None]:
        """Tick periodically in a thread while the block runs."""
        return periodic(self.tick, "reconciling", seconds, logger)

    def _is_driven(self, job: Job) -> bool:
        if self.leases.is_driven(job):
            # A dead driver's lease need not expire first.
            return job.handle is None or self.launcher.is_alive(job.handle) is not False
        if job.handle is None or job.launched_at is None or job.lease_owner is not None:
            return False
        # Waiting for resources of a full cluster is not a failure.
        in_time = self.store.database.now() < job.launched_at + self.retry_policy.resources
        return in_time and self.launcher.is_waiting(job.handle)

    def _start(self, job: Job) -> bool:
        if job.failures >= self.retry_policy.failures:
            self._give_up(job)
            return False
        if job.failures and job.launched_at is not None:
            wait = min(self.retry_policy.backoff * 2 ** (job.failures - 1), self.retry_policy.max_backoff)
            if self.store.database.now() < job.launched_at + wait:
                return False
        if job.handle is not None:
            # Before the claim, which removes the handle: an old driver's children must not outlive it.
            self.launcher.stop(job.handle)
        attempt = self.leases.claim(job)
        if attempt is None:
            return False
        if job.launched_at is not None:  # a driver that stopped cleanly has cleared it
            self.store.append(
                job.id,
                Event(
                    "The job was interrupted and resumes from its last saved state",
                    level="warn",
                    data={"attempt": attempt},
                    key=f"attempt/{attempt}",
                ),
            )
        try:
            handle = self.launcher.start(job.id, attempt)
        except Exception:
            # A failed start; the other jobs must still be started.
            logger.exception("job %s: attempt %d could not be launched", job.id, attempt)
            return False
        self.leases.set_handle(job.id, attempt, handle)
        return True

    def _give_up(self, job: Job) -> None:
        message = f"The job was interrupted {job.failures} times without progress, by the service; try again."
        if job.handle is not None:
            self.launcher.stop(job.handle)
        try:
            self.store.move(
                job.id,
                Status.FAILED,
                Event(message, level="error"),
                sources={job.status},
                error=JobError(INTERNAL_ERROR, message),
            )
        except ConflictError:
            return  # it was cancelled meanwhile

    def _collect(self, job: Job) -> None:
        if job.handle is None:
            return
        key, now = (job.id, job.attempt), self.store.database.now()
        limit = self.retry_policy.stop if job.status in TERMINAL else self.retry_policy.pause
        since = self._lingering.setdefault(key, now)
        if self.launcher.is_alive(job.handle) is not False and now < since + limit:
            return
        self.launcher.stop(job.handle)
        self.leases.forget(job)
