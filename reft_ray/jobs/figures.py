"""Metrics of the job store, read at each scrape: they survive restarts and are equal on every gateway."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from sqlalchemy import func, select

from reft_ray.jobs.audit import AuditLog
from reft_ray.jobs.job import Status
from reft_ray.jobs.job_store import JobStore
from reft_ray.jobs.lifecycle import SUITE
from reft_ray.jobs.results import Evaluation, Screening, result_of
from reft_ray.jobs.tables import job_steps, jobs
from reft_ray.telemetry import catalog
from reft_ray.telemetry.recorder import PrometheusRecorder, Readings

AUDIT_SECONDS = 300.0
"""Verifying reads the whole audit log, so it does not happen at every scrape."""

_MEASURES = {"harmful_score", "over_refusal", "finetune_accuracy"}
_INCOHERENT = "incoherent"


@dataclass(slots=True)
class Figures:
    """The job store as readings of catalogue metrics."""

    store: JobStore
    _breaks: float = 0.0
    _verified: float | None = field(default=None)

    def expose(self, recorder: PrometheusRecorder) -> None:
        """Register every reading with the recorder."""
        recorder.add_callback(catalog.JOBS, self.jobs)
        recorder.add_callback(catalog.JOB_OLDEST_QUEUED, self.oldest_queued)
        recorder.add_callback(catalog.QUARANTINE_ROWS, self.quarantine)
        recorder.add_callback(catalog.REVIEW_OLDEST, self.oldest_pending)
        recorder.add_callback(catalog.AUDIT_BREAKS, self.audit_breaks)
        recorder.add_callback(catalog.SAFETY_EVAL, self.safety)

    def jobs(self) -> Readings:
        """Jobs by project and status; every status is present, even without jobs."""
        counts = self.store.counts() or {("none", status): 0 for status in Status}
        for (project, status), count in counts.items():
            yield {"project": project, "status": str(status)}, count

    def oldest_queued(self) -> Readings:
        """Seconds that the first queued job has waited; 0 for an empty queue."""
        query = select(func.min(jobs.c.queued_at)).where(jobs.c.status == Status.QUEUED)
        with self.store.database.read() as connection:
            since = connection.execute(query).scalar_one()
        yield {}, 0.0 if since is None else max(0.0, self.store.database.now() - since)

    def quarantine(self) -> Readings:
        """Withheld rows of jobs with the review policy, by outcome."""
        states = {"pending": 0, "approved": 0, "rejected": 0, "expired": 0}
        for status, screened, reviewed, _ in self._reviews():
            if reviewed is not None:
                approved = reviewed.kept - screened.kept
                states["approved"] += approved
                states["rejected"] += screened.withheld - approved
            else:
                states["pending" if status is Status.PAUSED else "expired"] += screened.withheld
        for state, rows in states.items():
            yield {"state": state}, rows

    def oldest_pending(self) -> Readings:
        """Seconds that the oldest undecided row has waited; 0 when there is none."""
        since = [
            asked for status, _, reviewed, asked in self._reviews() if reviewed is None and status is Status.PAUSED
        ]
        yield {}, max(0.0, self.store.database.now() - min(since)) if since else 0.0

    def audit_breaks(self) -> Readings:
        """Whether the audit log is broken."""
        now = self.store.database.now()
        if self._verified is None or now >= self._verified + AUDIT_SECONDS:
            self._breaks = float(AuditLog(self.store.database).verify().fault is not None)
            self._verified = now
        yield {}, self._breaks

    def safety(self) -> Readings:
        """The measurements of the last release decision, of base and student."""
        query = (
            select(job_steps.c.result).where(job_steps.c.name == "evaluate").order_by(job_steps.c.finished_at.desc())
        )
        with self.store.database.read() as connection:
            document = connection.execute(query.limit(1)).scalar()
        if document is None:
            return
        checks = result_of(Evaluation, document).checks
        yielded: set[tuple[str, str, str]] = set()
        for check in checks:
            name, _, task = check.measure.partition("/")
            measure = "coherence" if name == _INCOHERENT else name
            if measure not in {*_MEASURES, "coherence"}:
                continue
            for model, percent in (("base", check.base), ("student", check.student)):
                key = (measure, task, model)
                if percent is None or key in yielded:
                    continue
                yielded.add(key)
                share = percent / 100.0
                yield (
                    {"suite": task or SUITE, "measure": measure, "model": model},
                    1.0 - share if name == _INCOHERENT else share,
                )

    def _reviews(self) -> Iterator[tuple[Status, Screening, Screening | None, float]]:
        """Jobs with the review policy: status, screening, screening after review, and when the review was requested."""
        asked = job_steps.alias("asked")
        screened = job_steps.alias("screened")
        reviewed = job_steps.alias("reviewed")
        query = (
            select(jobs.c.status, screened.c.result, reviewed.c.result, asked.c.finished_at)
            .select_from(asked)
            .join(jobs, jobs.c.id == asked.c.job_id)
            .join(screened, (screened.c.job_id == asked.c.job_id) & (screened.c.name == "screen"))
            .outerjoin(reviewed, (reviewed.c.job_id == asked.c.job_id) & (reviewed.c.name == "review"))
            .where(asked.c.name == "ask")
        )
        with self.store.database.read() as connection:
            rows = list(connection.execute(query))
        for status, before, after, since in rows:
            yield (
                Status(status),
                result_of(Screening, before),
                None if after is None else result_of(Screening, after),
                since,
            )
