"""`/fine_tuning`: jobs, their events and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, Query, Request
from pydantic import BaseModel, Field

from reft_ray.api import serializers as wire
from reft_ray.api.auth import Caller
from reft_ray.api.errors import invalid, not_found
from reft_ray.api.job_schema import parse
from reft_ray.api.stores import Services
from reft_ray.jobs.errors import NotFoundError
from reft_ray.jobs.estimate import estimate
from reft_ray.jobs.job import Event, Job, Status
from reft_ray.jobs.speeds import measured_speed
from reft_ray.jobs.tenants import Principal

Limit = Annotated[int, Query(ge=1, le=1000)]


class ShareBody(BaseModel):
    """The body of `POST /fine_tuning/checkpoints/{name}/permissions`."""

    project_ids: list[str] = Field(min_length=1, max_length=100)


def router(services: Services) -> APIRouter:
    """The routes of finetuning jobs. Cancel, pause and resume take no body."""
    routes = APIRouter(tags=["fine-tuning"])
    jobs = services.jobs

    @routes.post("/fine_tuning/jobs")
    def create_job(
        body: Annotated[Any, Body()],
        caller: Caller,
        idempotency_key: Annotated[str | None, Header(min_length=1, max_length=256)] = None,
    ) -> dict[str, Any]:
        """Create a job; it starts to validate its files at once. With an `Idempotency-Key` it is created once."""
        spec, metadata = parse(body, services.settings)
        _check_files(services, caller, spec.training_file, spec.validation_file)
        job = jobs.create(
            caller.organization_id,
            caller.project_id,
            spec,
            metadata,
            actor=caller.actor,
            max_unfinished=caller.limits.unfinished_jobs,
            request_key=idempotency_key,
        )
        return wire.job(job)

    @routes.post("/fine_tuning/jobs/estimate")
    def estimate_job(body: Annotated[Any, Body()], caller: Caller) -> dict[str, Any]:
        """What such a job would cost; the body is that of a creation."""
        spec, _ = parse(body, services.settings)
        _check_files(services, caller, spec.training_file, spec.validation_file)
        base = services.settings.base_models[spec.model]
        size = services.counter(spec.model, services.files.read(spec.training_file, caller.project_id))
        speed = measured_speed(services.database, spec.model, base.preset, base.devices) or base.speed
        result = estimate(size, spec.hyperparameters, base.defaults, speed)
        return {"object": "fine_tuning.job.estimate", "model": spec.model, **asdict(result)}

    @routes.get("/fine_tuning/jobs")
    def list_jobs(request: Request, caller: Caller, after: str | None = None, limit: Limit = 20) -> dict[str, Any]:
        """The project's jobs, newest first."""
        wanted, without = _metadata(request.query_params)
        page = jobs.list(caller.project_id, after=after, limit=limit, metadata=wanted, without_metadata=without)
        return wire.cursor_page(page, wire.job)

    @routes.get("/fine_tuning/jobs/{job_id}")
    def retrieve_job(job_id: str, caller: Caller) -> dict[str, Any]:
        """One job."""
        job = _job(services, caller, job_id)
        return wire.job(job, jobs.queue_position(job))

    @routes.post("/fine_tuning/jobs/{job_id}/cancel")
    def cancel_job(job_id: str, caller: Caller) -> dict[str, Any]:
        """End a job for good; its driver stops within seconds."""
        _job(services, caller, job_id)
        event = Event("Fine-tuning job cancelled")
        return wire.job(jobs.move(job_id, Status.CANCELLED, event, actor=caller.actor))

    @routes.post("/fine_tuning/jobs/{job_id}/pause")
    def pause_job(job_id: str, caller: Caller) -> dict[str, Any]:
        """Save the job's state and give its devices back."""
        _job(services, caller, job_id)
        return wire.job(jobs.move(job_id, Status.PAUSED, Event("Fine-tuning job paused"), actor=caller.actor))

    @routes.post("/fine_tuning/jobs/{job_id}/resume")
    def resume_job(job_id: str, caller: Caller) -> dict[str, Any]:
        """Go on where the job was paused, by way of the queue if it had reached it."""
        job = _job(services, caller, job_id)
        back = Status.VALIDATING if job.queued_at is None else Status.QUEUED
        event = Event("Fine-tuning job resumed")
        return wire.job(jobs.move(job_id, back, event, sources={Status.PAUSED}, actor=caller.actor))

    @routes.get("/fine_tuning/jobs/{job_id}/events")
    def list_events(job_id: str, caller: Caller, after: str | None = None, limit: Limit = 20) -> dict[str, Any]:
        """The job's log, newest first."""
        _job(services, caller, job_id)
        return wire.cursor_page(jobs.events(job_id, after=after, limit=limit), wire.event)

    @routes.get("/fine_tuning/jobs/{job_id}/checkpoints")
    def list_checkpoints(job_id: str, caller: Caller, after: str | None = None, limit: Limit = 10) -> dict[str, Any]:
        """The job's checkpoints, newest first."""
        job = _job(services, caller, job_id)
        page = jobs.checkpoints(job_id, after=after, limit=limit)
        return wire.cursor_page(page, lambda checkpoint: wire.checkpoint(checkpoint, job), ends=True)

    @routes.get("/fine_tuning/checkpoints/{name:path}/permissions")
    def list_permissions(
        name: str,
        caller: Caller,
        after: str | None = None,
        limit: Limit = 10,
        project_id: str | None = None,
    ) -> dict[str, Any]:
        """Which projects may use a checkpoint."""
        page = services.models.permissions(name, caller.project_id, after=after, limit=limit, only=project_id)
        return wire.cursor_page(page, wire.permission, ends=True)

    @routes.post("/fine_tuning/checkpoints/{name:path}/permissions")
    def create_permissions(name: str, body: ShareBody, caller: Caller) -> dict[str, Any]:
        """Let other projects of the organisation use a checkpoint."""
        made = services.models.share(name, caller.project_id, body.project_ids)
        for permission in made:
            services.audit.append(
                "checkpoint.permission.created", caller.actor, caller.project_id, {"id": permission.id}
            )
        data = [wire.permission(permission) for permission in made]
        return {
            "object": "list",
            "data": data,
            "has_more": False,
            "first_id": data[0]["id"],
            "last_id": data[-1]["id"],
        }

    @routes.delete("/fine_tuning/checkpoints/{name:path}/permissions/{permission_id}")
    def delete_permission(name: str, permission_id: str, caller: Caller) -> dict[str, Any]:
        """Take a permission back."""
        services.models.unshare(name, caller.project_id, permission_id)
        services.audit.append("checkpoint.permission.deleted", caller.actor, caller.project_id, {"id": permission_id})
        return {"id": permission_id, "object": "checkpoint.permission", "deleted": True}

    return routes


def _job(services: Services, caller: Principal, job_id: str) -> Job:
    try:
        return services.jobs.get(job_id, caller.project_id)
    except NotFoundError:
        raise not_found(f"Could not find fine tune: {job_id[:64]}", "fine_tune_id", "fine_tune_not_found") from None


def _check_files(services: Services, caller: Principal, training: str, validation: str | None) -> None:
    for param, file_id in (("training_file", training), ("validation_file", validation)):
        if file_id is None:
            continue
        try:
            record = services.files.get(file_id, caller.project_id)
        except NotFoundError:
            raise invalid(f"invalid {param}: {file_id[:64]}", param, f"invalid_{param}") from None
        if record.purpose != "fine-tune":
            raise invalid(
                f"File {file_id} has purpose '{record.purpose}'; a {param} needs 'fine-tune'.",
                param,
                f"invalid_{param}",
            )


def _metadata(query: Mapping[str, str]) -> tuple[dict[str, str], bool]:
    wanted = {key[9:-1]: value for key, value in query.items() if key.startswith("metadata[") and key.endswith("]")}
    return wanted, query.get("metadata") in ("null", "")
