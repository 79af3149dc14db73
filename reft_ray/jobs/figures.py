"""Metrics of the job store, read at each scrape: they survive restarts and are equal on every gateway."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from sqlalchemy import func, select

from reft_ray.core.proportion import Share
from reft_ray.jobs.audit import AuditLog
from reft_ray.jobs.audit_heads import AuditHeads
from reft_ray.jobs.job import TERMINAL, Status
from reft_ray.jobs.job_store import JobStore
from reft_ray.jobs.lifecycle import SUITE
from reft_ray.jobs.results import Evaluation, result_of
from reft_ray.jobs.review import OPEN, Kind, State
from reft_ray.jobs.review_stats import TeacherStats, oldest_pending, teacher_stats
from reft_ray.jobs.tables import job_steps, jobs, review_counts
from reft_ray.telemetry import catalog, labels
from reft_ray.telemetry.recorder import PrometheusRecorder, Readings

AUDIT_SECONDS = 300.0
"""Verifying reads the whole audit log, so it does not happen at every scrape."""

_MEASURES = {"harmful_score", "over_refusal", "finetune_accuracy"}
_INCOHERENT = "incoherent"


@dataclass(slots=True)
class Figures:
    """The job store as readings of catalogue metrics."""

    store: JobStore
    heads: AuditHeads | None = None
    _breaks: float = 0.0
    _verified: float | None = field(default=None)

    def expose(self, recorder: PrometheusRecorder) -> None:
        """Register every reading with the recorder."""
        recorder.add_callback(catalog.JOBS, self.jobs)
        recorder.add_callback(catalog.JOB_OLDEST_QUEUED, self.oldest_queued)
        recorder.add_callback(catalog.QUARANTINE_ROWS, self.quarantine)
        recorder.add_callback(catalog.REVIEW_OLDEST, self.oldest_pending)
        recorder.add_callback(catalog.REVIEW_OVERTURNED, self.overturned)
        recorder.add_callback(catalog.REVIEW_MISSED, self.missed)
        recorder.add_callback(catalog.REVIEW_FALSE_POSITIVES, self.false_positives)
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
        """Withheld rows that people were asked about, by outcome; those of jobs that ended before are expired."""
        states = {"pending": 0, "approved": 0, "rejected": 0, "expired": 0}
        query = (
            select(review_counts.c.state, jobs.c.status, func.sum(review_counts.c.total))
            .join(jobs, jobs.c.id == review_counts.c.job_id)
            .where(review_counts.c.kind == Kind.WITHHELD, review_counts.c.state != State.WITHHELD)
            .group_by(review_counts.c.state, jobs.c.status)
        )
        with self.store.database.read() as connection:
            found = connection.execute(query).all()
        for state, status, rows in found:
            waiting = "expired" if status in TERMINAL else "pending"
            states[waiting if state in OPEN else state] += int(rows)
        for state, rows in states.items():
            yield {"state": state}, rows

    def oldest_pending(self) -> Readings:
        """Seconds that the oldest undecided row has waited; 0 when there is none."""
        since = oldest_pending(self.store.database)
        yield {}, 0.0 if since is None else max(0.0, self.store.database.now() - since)

    def overturned(self) -> Readings:
        """Overturned rows by teacher."""
        return self._shares(lambda stats: stats.overturned)

    def missed(self) -> Readings:
        """Missed rows by teacher."""
        return self._shares(lambda stats: stats.missed)

    def false_positives(self) -> Readings:
        """Withheld harmless rows by teacher."""
        for stats in teacher_stats(self.store.database):
            for bound in labels.BOUND.values:
                if (share := stats.false_positives(bound)) is not None:
                    yield {"teacher": stats.teacher, "bound": bound}, share

    def _shares(self, share_of: Callable[[TeacherStats], Share]) -> Readings:
        for stats in teacher_stats(self.store.database):
            share = share_of(stats)
            if share.value is not None:
                low, high = share.bounds
                for bound, value in (("estimate", share.value), ("low", low), ("high", high)):
                    yield {"teacher": stats.teacher, "bound": bound}, value

    def audit_breaks(self) -> Readings:
        """Whether the audit log is broken."""
        now = self.store.database.now()
        if self._verified is None or now >= self._verified + AUDIT_SECONDS:
            log = AuditLog(self.store.database)
            verified = log.verify() if self.heads is None else self.heads.verify(log)
            self._breaks = float(verified.fault is not None)
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
