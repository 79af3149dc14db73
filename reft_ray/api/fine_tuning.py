"""`/fine_tuning`: jobs, their events and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, Query, Request
from pydantic import BaseModel, Field
from sqlalchemy import Connection

from reft_ray.api import serializers as wire
from reft_ray.api.auth import Caller
from reft_ray.api.errors import not_found
from reft_ray.api.job_schema import parse
from reft_ray.api.stores import Stores
from reft_ray.jobs.errors import NotFoundError
from reft_ray.jobs.estimate import estimate
from reft_ray.jobs.job import Job, JobSpec
from reft_ray.jobs.speeds import measured_speed
from reft_ray.jobs.tenants import Principal

Limit = Annotated[int, Query(ge=1, le=1000)]


class ShareBody(BaseModel):
    """The body of `POST /fine_tuning/checkpoints/{name}/permissions`."""

    project_ids: list[str] = Field(min_length=1, max_length=100)


def router(stores: Stores) -> APIRouter:
    """The routes of finetuning jobs. Cancel, pause and resume have no body."""
    routes = APIRouter(tags=["fine-tuning"])
    jobs = stores.jobs

    @routes.post("/fine_tuning/jobs")
    def create_job(
        body: Annotated[Any, Body()],
        caller: Caller,
        idempotency_key: Annotated[str | None, Header(min_length=1, max_length=256)] = None,
    ) -> dict[str, Any]:
        """Create a job and start to validate its files. With an `Idempotency-Key`, repeated requests create one job."""
        spec, metadata = parse(body, stores.settings)
        job = jobs.create(
            caller.organization_id,
            caller.project_id,
            spec,
            metadata,
            actor=caller.actor,
            max_unfinished=caller.limits.unfinished_jobs,
            request_key=idempotency_key,
            seeded=body.get("seed") is not None,
            admit=_files_of(stores, caller, spec),
        )
        return wire.job(job)

    @routes.post("/fine_tuning/jobs/estimate")
    def estimate_job(body: Annotated[Any, Body()], caller: Caller) -> dict[str, Any]:
        """Estimate a job's tokens, steps and time; takes the body of a job creation."""
        spec, _ = parse(body, stores.settings)
        with stores.database.write() as connection:
            _files_of(stores, caller, spec)(connection)
        base = stores.settings.base_models[spec.model]
        size = stores.counter(spec.model, stores.files.read(spec.training_file, caller.project_id))
        speed = measured_speed(stores.database, spec.model, base.preset, base.devices) or base.speed
        if speed is None and (first := stores.first_speeds.of(spec.model)) is not None:
            speed = first.model_copy(update={"devices": base.devices})
        result = estimate(size, spec.hyperparameters, base, speed)
        cost = base.price.cost_of(result) if base.price else None
        return {
            "object": "fine_tuning.job.estimate",
            "model": spec.model,
            **asdict(result),
            "cost": None if cost is None else asdict(cost),
        }

    @routes.get("/fine_tuning/jobs")
    def list_jobs(request: Request, caller: Caller, after: str | None = None, limit: Limit = 20) -> dict[str, Any]:
        """List the project's jobs, newest first."""
        wanted, without = _metadata(request.query_params)
        page = jobs.list(caller.project_id, after=after, limit=limit, metadata=wanted, without_metadata=without)
        return wire.cursor_page(page, wire.job)

    @routes.get("/fine_tuning/jobs/{job_id}")
    def retrieve_job(job_id: str, caller: Caller) -> dict[str, Any]:
        """Retrieve a job."""
        job = _job(stores, caller, job_id)
        return wire.job(job, jobs.queue_position(job))

    @routes.post("/fine_tuning/jobs/{job_id}/cancel")
    def cancel_job(job_id: str, caller: Caller) -> dict[str, Any]:
        """Cancel a job; its driver stops within seconds."""
        return wire.job(jobs.steer(_job(stores, caller, job_id), "cancel", caller.actor))

    @routes.post("/fine_tuning/jobs/{job_id}/pause")
    def pause_job(job_id: str, caller: Caller) -> dict[str, Any]:
        """Save the job's state and free its devices."""
        return wire.job(jobs.steer(_job(stores, caller, job_id), "pause", caller.actor))

    @routes.post("/fine_tuning/jobs/{job_id}/resume")
    def resume_job(job_id: str, caller: Caller) -> dict[str, Any]:
        """Resume a paused job from its saved state; a job that was queued or running is queued again."""
        return wire.job(jobs.steer(_job(stores, caller, job_id), "resume", caller.actor))

    @routes.get("/fine_tuning/jobs/{job_id}/events")
    def list_events(job_id: str, caller: Caller, after: str | None = None, limit: Limit = 20) -> dict[str, Any]:
        """List the job's events, newest first."""
        _job(stores, caller, job_id)
        return wire.cursor_page(jobs.events(job_id, after=after, limit=limit), wire.event)

    @routes.get("/fine_tuning/jobs/{job_id}/checkpoints")
    def list_checkpoints(job_id: str, caller: Caller, after: str | None = None, limit: Limit = 10) -> dict[str, Any]:
        """List the job's checkpoints, newest first."""
        job = _job(stores, caller, job_id)
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
        """List the projects that may use a checkpoint."""
        page = stores.models.permissions(name, caller.project_id, after=after, limit=limit, only=project_id)
        return wire.cursor_page(page, wire.permission, ends=True)

    @routes.post("/fine_tuning/checkpoints/{name:path}/permissions")
    def create_permissions(name: str, body: ShareBody, caller: Caller) -> dict[str, Any]:
        """Allow other projects of the organisation to use a checkpoint."""
        made = stores.models.share(name, caller.project_id, body.project_ids, caller.actor)
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
        """Revoke a permission."""
        stores.models.unshare(name, caller.project_id, permission_id, caller.actor)
        return {"id": permission_id, "object": "checkpoint.permission", "deleted": True}

    return routes


def _job(stores: Stores, caller: Principal, job_id: str) -> Job:
    try:
        return stores.jobs.get(job_id, caller.project_id)
    except NotFoundError:
        raise not_found(f"Could not find fine tune: {job_id[:64]}", "fine_tune_id", "fine_tune_not_found") from None


def _files_of(stores: Stores, caller: Principal, spec: JobSpec) -> Callable[[Connection], None]:
    def check(connection: Connection) -> None:
        stores.files.check_usable_in(connection, caller.project_id, spec.training_file, spec.validation_file)

    return check


def _metadata(query: Mapping[str, str]) -> tuple[dict[str, str], bool]:
    wanted = {key[9:-1]: value for key, value in query.items() if key.startswith("metadata[") and key.endswith("]")}
    return wanted, query.get("metadata") in ("null", "")
