"""Records -> OpenAI's JSON. Every key that the specification requires is present, null without a value."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any, TypeVar

from reft_ray.jobs.files import FileRecord
from reft_ray.jobs.job import Checkpoint, Job, StoredEvent
from reft_ray.jobs.models import Permission, Student
from reft_ray.jobs.paging import Page
from reft_ray.jobs.uploads import Upload

T = TypeVar("T")


def seconds(time: float | None) -> int | None:
    """A time in OpenAI's format: whole seconds since the epoch."""
    return None if time is None else int(time)


def cursor_page(items: Page[T], form: Callable[[T], dict[str, Any]], ends: bool = False) -> dict[str, Any]:
    """A list object; with `ends`, also with the first and last id."""
    data = [form(item) for item in items.items]
    body: dict[str, Any] = {"object": "list", "data": data, "has_more": items.has_more}
    if ends:
        body |= {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return body


def whole_list(data: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """A list without pages."""
    return {"object": "list", "data": list(data)}


def file(record: FileRecord) -> dict[str, Any]:
    """The `file` object."""
    return {
        "id": record.id,
        "object": "file",
        "bytes": record.bytes,
        "created_at": seconds(record.created_at),
        "expires_at": seconds(record.expires_at),
        "filename": record.filename,
        "purpose": record.purpose,
        "status": record.status,
        "status_details": record.status_details,
    }


def upload(record: Upload, finished: FileRecord | None = None) -> dict[str, Any]:
    """The `upload` object, with its file once it is completed."""
    return {
        "id": record.id,
        "object": "upload",
        "bytes": record.bytes,
        "created_at": seconds(record.created_at),
        "expires_at": seconds(record.expires_at),
        "filename": record.filename,
        "purpose": record.purpose,
        "status": record.status,
        "file": None if finished is None else file(finished),
    }


def job(record: Job, queue_position: int | None = None) -> dict[str, Any]:
    """The `fine_tuning.job` object. `reft` has our options and, while queued, the position in the queue."""
    spec = record.spec
    hyperparameters = asdict(spec.hyperparameters)
    return {
        "id": record.id,
        "object": "fine_tuning.job",
        "created_at": seconds(record.created_at),
        "error": None if record.error is None else asdict(record.error),
        "estimated_finish": seconds(record.estimated_finish),
        "fine_tuned_model": record.fine_tuned_model,
        "finished_at": seconds(record.finished_at),
        "hyperparameters": hyperparameters,
        "integrations": [dict(item) for item in spec.integrations],
        "metadata": dict(record.metadata),
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "model": spec.model,
        "organization_id": record.organization_id,
        "result_files": list(record.result_files),
        "seed": spec.seed,
        "status": str(record.status),
        "trained_tokens": record.trained_tokens,
        "training_file": spec.training_file,
        "validation_file": spec.validation_file,
        "suffix": spec.suffix,
        "reft": {**asdict(spec.options), "queue_position": queue_position},
    }


def event(record: StoredEvent) -> dict[str, Any]:
    """The `fine_tuning.job.event` object."""
    return {
        "id": record.id,
        "object": "fine_tuning.job.event",
        "created_at": seconds(record.created_at),
        "level": record.event.level,
        "message": record.event.message,
        "type": record.event.type,
        "data": dict(record.event.data),
    }


def checkpoint(record: Checkpoint, owner: Job) -> dict[str, Any]:
    """The `fine_tuning.job.checkpoint` object."""
    return {
        "id": record.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": seconds(record.created_at),
        "fine_tuned_model_checkpoint": owner.checkpoint_name(record.step_number),
        "fine_tuning_job_id": record.job_id,
        "step_number": record.step_number,
        "metrics": dict(record.metrics),
    }


def permission(record: Permission) -> dict[str, Any]:
    """The `checkpoint.permission` object."""
    return {
        "id": record.id,
        "object": "checkpoint.permission",
        "created_at": seconds(record.created_at),
        "project_id": record.project_id,
    }


def base_model(name: str, created_at: int) -> dict[str, Any]:
    """The `model` object of a base model."""
    return {"id": name, "object": "model", "created": created_at, "owned_by": "system"}


def student(record: Student) -> dict[str, Any]:
    """The `model` object of a finetuned model."""
    return {
        "id": record.id,
        "object": "model",
        "created": seconds(record.created_at),
        "owned_by": record.organization_id,
        "parent": record.base_model,
        "job": record.job_id,
    }
