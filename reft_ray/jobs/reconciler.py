"""What keeps every job going: it looks at the records, at the drivers, and makes the one fit the other.

All gateways may run one: whatever it does is compare-and-set. It remembers nothing that matters, so a service that
was killed finds every job again by looking.
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
    """How long to wait, in seconds, and how often to try.

    `stop`: for a driver of a job that was cancelled; `pause`: for one that saves its state; `backoff`: before the
    second start, doubled for each further one, `backoff_most` at most; `failures`: starts without any progress;
    `place`: for a driver that was launched where there is no room for it yet.
    """

    stop: float = 15.0
    pause: float = 300.0
    backoff: float = 1.0
    backoff_most: float = 60.0
    failures: int = 5
    place: float = 6 * 3600.0


@dataclass(slots=True)
class Reconciler:
    """One look at all unfinished jobs per `tick`."""

    store: JobStore
    leases: Leases
    launcher: Launcher
    slots: Slots = field(default_factory=Slots)
    patience: RetryPolicy = field(default_factory=RetryPolicy)
    _lingering: dict[tuple[str, int], float] = field(default_factory=dict)

    def tick(self) -> None:
        """Collect drivers that are not wanted any more, hand out slots, start the drivers that are missing."""
        unwanted = {(job.id, job.attempt): job for job in self.store.with_handle() if job.status not in ACTIVE}
        # A driver that is wanted again, or gone, has all the time from the next time on.
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
        while waiting and validating.total() < self.slots.validating:
            job = min(waiting, key=lambda job: validating[job.project_id])
            waiting.remove(job)
            if self._start(job):
                validating[job.project_id] += 1

    def background(self, seconds: float = 1.0) -> AbstractContextManager[None]:
        """Tick in a thread of its own while the block runs. A tick that fails is logged, the next one tries again."""
        return periodic(self.tick, "reconciling", seconds, logger)

    def _is_driven(self, job: Job) -> bool:
        if self.leases.is_driven(job):
            # A dead driver's lease need not be waited for.
            return job.handle is None or self.launcher.is_alive(job.handle) is not False
        if job.handle is None or job.launched_at is None or job.lease_owner is not None:
            return False
        # To wait for a place in a full cluster is no failure.
        patient = self.store.database.now() < job.launched_at + self.patience.place
        return patient and self.launcher.is_waiting(job.handle)

    def _start(self, job: Job) -> bool:
        if job.failures >= self.patience.failures:
            self._give_up(job)
            return False
        if job.failures and job.launched_at is not None:
            wait = min(self.patience.backoff * 2 ** (job.failures - 1), self.patience.backoff_most)
            if self.store.database.now() < job.launched_at + wait:
                return False
        if job.handle is not None:
            # Before the claim, which forgets the handle: an old driver's children must not outlive it.
            self.launcher.stop(job.handle)
        attempt = self.leases.claim(job)
        if attempt is None:
            return False
        if job.launched_at is not None:  # a driver that stops in good order takes its launch off the records
            self.store.append(
                job.id,
                Event(
                    "The job was interrupted and goes on from its last saved state",
                    level="warn",
                    data={"attempt": attempt},
                    key=f"attempt/{attempt}",
                ),
            )
        try:
            handle = self.launcher.start(job.id, attempt)
        except Exception:
            # One job that cannot be started must not keep the others waiting; it counts as a failed start.
            logger.exception("job %s: attempt %d could not be launched", job.id, attempt)
            return False
        self.leases.set_handle(job.id, attempt, handle)
        return True

    def _give_up(self, job: Job) -> None:
        message = f"The job was interrupted {job.failures} times without progress. This is not your fault; try again."
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
            return  # it was cancelled in this moment

    def _collect(self, job: Job) -> None:
        if job.handle is None:
            return
        key, now = (job.id, job.attempt), self.store.database.now()
        patience = self.patience.stop if job.status in TERMINAL else self.patience.pause
        since = self._lingering.setdefault(key, now)
        if self.launcher.is_alive(job.handle) is not False and now < since + patience:
            return
        self.launcher.stop(job.handle)
        self.leases.forget(job)
