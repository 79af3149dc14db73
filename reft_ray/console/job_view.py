"""What the page of a job shows, from its records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from reft_ray.api.stores import Stores
from reft_ray.console import charts
from reft_ray.jobs.errors import NotFoundError
from reft_ray.jobs.files import FileRecord
from reft_ray.jobs.job import Job, Status, StoredEvent
from reft_ray.jobs.releases import Release
from reft_ray.jobs.results import Evaluation, result_of
from reft_ray.jobs.review_queue import Filter
from reft_ray.jobs.review_stats import counts

STAGES = (
    ("validate", "Validate"),
    ("screen", "Screen"),
    ("review", "Review"),
    ("train", "Train"),
    ("evaluate", "Gate"),
    ("export", "Export"),
)
_LOSSES = {"train_loss": "training", "valid_loss": "validation"}
_REPORT_HEAD = 1 << 20


@dataclass(frozen=True, slots=True)
class JobView:
    """A job with its stages (name, state), losses, gate, files and newest events."""

    job: Job
    stages: tuple[tuple[str, str], ...]
    progress: float | None
    position: int | None
    losses: list[charts.Curve]
    checks: tuple[Any, ...]
    screening: Mapping[str, Any]
    states: Mapping[str, int]
    files: tuple[FileRecord, ...]
    events: tuple[StoredEvent, ...]
    release: Release | None

    @classmethod
    def of(cls, stores: Stores, job: Job) -> JobView:
        """Read everything that the page shows."""
        steps = stores.jobs.steps(job.id)
        events = stores.jobs.events(job.id, limit=200).items
        metrics = [item.event.data for item in reversed(events) if item.event.type == "metrics"]
        series = {
            label: [(data["step"], data[key]) for data in metrics if isinstance(data.get(key), float)]
            for key, label in _LOSSES.items()
        }
        gate = result_of(Evaluation, steps["evaluate"]).checks if "evaluate" in steps else ()
        return cls(
            job=job,
            stages=tuple(_stages(job, steps)),
            progress=metrics[-1]["step"] / metrics[-1]["total_steps"] if metrics else None,
            position=stores.jobs.queue_position(job),
            losses=charts.curves(series),
            checks=gate,
            screening=steps.get("review") or steps.get("screen") or {},
            states=counts(stores.database, Filter(job=job.id, kind="withheld", state=None)),
            files=tuple(_files(stores, job)),
            events=tuple(item for item in events if item.event.type != "metrics")[:30],
            release=stores.releases.find(job.id),
        )


def report_of(stores: Stores, job: Job) -> dict[str, Any] | None:
    """The head of the job's screening report: counts, thresholds, histogram and findings."""
    file_id = stores.jobs.steps(job.id).get("screen", {}).get("report_file")
    if file_id is None:
        return None
    try:
        head = stores.files.read_range(file_id, job.project_id, 0, _REPORT_HEAD)
    except NotFoundError:
        return None
    report: dict[str, Any] = orjson.loads(head.split(b"\n", 1)[0])
    return report


def _stages(job: Job, steps: Mapping[str, Any]) -> Any:
    asked = job.spec.options.policy == "review" or "review" in steps
    names = [(name, label) for name, label in STAGES if name != "review" or asked]
    current = next((name for name, _ in names if name not in steps), None)
    for name, label in names:
        if name in steps:
            yield label, "done"
        elif name == current and job.status is Status.FAILED:
            yield label, "failed"
        elif name == current and job.status not in (Status.CANCELLED, Status.SUCCEEDED):
            yield label, "waiting" if job.status in (Status.PAUSED, Status.QUEUED) else "running"
        else:
            yield label, "open"


def _files(stores: Stores, job: Job) -> Any:
    for file_id in job.result_files:
        try:
            yield stores.files.get(file_id, job.project_id)
        except NotFoundError:
            continue
