"""The measured speed of a base model's jobs, from the records of successful ones, for estimates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from sqlalchemy import Connection, func, select

from reft_ray.jobs.database import Database
from reft_ray.jobs.estimate import Speed
from reft_ray.jobs.job import Job, Status
from reft_ray.jobs.job_rows import COLUMNS, job_of
from reft_ray.jobs.tables import job_events, job_steps, jobs

JOBS = 20
"""The number of newest jobs that count: devices and models change."""

_UNDISTURBED = 2
"""Attempts of a job that was neither paused nor interrupted: one driver before the queue and one after."""

_LEAST_SECONDS = 1e-3


@dataclass(frozen=True, slots=True)
class _Run:
    """Times of one job in seconds: `busy` in total without the queue, of which `screening` took that long.

    `training` is the time from the first report to the last, without start-up; it covers `steps` and the `share` of all
    `tokens` that were trained in it.
    """

    busy: float
    rows: int
    screening: float
    tokens: int
    steps: int
    share: float
    training: float


def measured_speed(database: Database, model: str, preset: str | None = None, devices: int = 1) -> Speed | None:
    """The speed of the newest undisturbed jobs with this base model and preset; None without any.

    Rows per second are those of the fastest job, because small files mostly measure loading the teacher; tokens per
    second and seconds per step are averages over all jobs. The remaining time of a job is its fixed time.
    """
    with database.read() as connection:
        runs = [run for job in _finished(connection, model, preset) if (run := _run_of(connection, job)) is not None]
    if not runs:
        return None
    training = sum(run.training for run in runs)
    tokens = sum(run.tokens * run.share for run in runs) / training
    step_seconds = training / sum(run.steps for run in runs)
    rows = max(run.rows / run.screening for run in runs)
    fixed = median(run.busy - run.rows / rows - run.tokens / tokens for run in runs)
    return Speed(
        training_tokens=tokens,
        screening_rows=rows,
        start_seconds=max(0.0, fixed),
        devices=devices,
        overhead=0.0,
        step_seconds=step_seconds,
    )


def _finished(connection: Connection, model: str, preset: str | None) -> Sequence[Job]:
    query = (
        select(*COLUMNS)
        .where(jobs.c.status == Status.SUCCEEDED, jobs.c.attempt == _UNDISTURBED, jobs.c.model == model)
        .order_by(jobs.c.finished_at.desc())
        .limit(JOBS)
    )
    return [job for row in connection.execute(query) if (job := job_of(row)).spec.preset == preset]


def _run_of(connection: Connection, job: Job) -> _Run | None:
    """The times of a job; None for one that was too short to measure."""
    query = select(job_steps.c.name, job_steps.c.finished_at, job_steps.c.result).where(job_steps.c.job_id == job.id)
    steps = {row.name: row for row in connection.execute(query)}
    metrics = (job_events.c.job_id == job.id) & (job_events.c.type == "metrics")
    ends = connection.execute(select(func.min(job_events.c.seq), func.max(job_events.c.seq)).where(metrics)).one()
    first, last = (connection.execute(select(job_events).where(job_events.c.seq == seq)).first() for seq in ends)
    times = (job.queued_at, job.started_at, job.finished_at)
    if first is None or last is None or None in times or not job.trained_tokens:
        return None
    queued_at, started_at, finished_at = (float(time or 0.0) for time in times)
    taken = last.data["step"] - first.data["step"]
    training = last.created_at - first.created_at
    if taken <= 0 or training < _LEAST_SECONDS:
        return None
    return _Run(
        busy=(queued_at - job.created_at) + (finished_at - started_at),
        rows=int(steps["screen"].result["rows"]),
        screening=max(_LEAST_SECONDS, steps["screen"].finished_at - steps["validate"].finished_at),
        tokens=job.trained_tokens,
        steps=taken,
        share=taken / last.data["total_steps"],
        training=training,
    )
