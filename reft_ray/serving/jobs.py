"""The finetuning service of a gateway: stores, reconciler and launcher from the operator's arguments."""

from __future__ import annotations

import os
from pathlib import Path

import ray
from fastapi import FastAPI

from reft_ray.api.background import working
from reft_ray.api.chat_model import ChatModel
from reft_ray.api.moderator import Moderator
from reft_ray.api.service import create_service
from reft_ray.api.stores import BaseModel, Services, ServiceSettings
from reft_ray.jobs.database import Database
from reft_ray.jobs.driver import DriverConfig, named, resolved
from reft_ray.jobs.estimate import Counter, Defaults, Speed
from reft_ray.jobs.launcher import Launcher, ProcessLauncher
from reft_ray.jobs.lease import Slots
from reft_ray.serving.args import BaseModelArgs, ServeArgs, ServiceArgs, from_environment
from reft_ray.serving.ray_launcher import RayLauncher
from reft_ray.telemetry.metric_types import DEFAULT_APPLICATION
from reft_ray.telemetry.recorder import Recorder

_RAY_OWN = ("RAY_RAYLET", "RAY_NODE", "RAY_JOB", "RAY_SERVE", "RAY_LD", "RAY_WORKER", "RAY_SESSION", "RAY_GCS")
"""What Ray tells its workers about themselves; a driver that is started by one is none."""


def service_app(args: ServeArgs, judge: Moderator, chat: ChatModel, recorder: Recorder) -> FastAPI:
    """The whole service over a judge and a chat model; the jobs are looked after while the application lives.

    Raises UsageError for options that the steps do not take: here, once, and not in the driver of every job.
    """
    service = args.service
    assert service is not None, "the arguments have a section `service`"
    driver_config(service).make_steps()
    database = Database.open(resolved(service.database_url))
    services = Services.open(database, service.files_uri, settings_of(service), counter_of(service), recorder)
    return create_service(
        judge,
        services,
        chat,
        args.filter.settings(),
        screenings_uri=args.screenings_uri,
        recorder=recorder,
        metrics_token=from_environment(args.metrics_token_variable),
        lifespan=working(services, launcher_of(service, args.application), Slots(**service.slots.model_dump())),
    )


def settings_of(args: ServiceArgs) -> ServiceSettings:
    """The same for the API, which knows no pydantic settings."""
    return ServiceSettings(
        base_models={name: _base(base) for name, base in args.base_models.items()},
        alignment_datasets=frozenset(args.alignment_datasets),
        gate=args.gate,
        max_reject_ratio=args.max_reject_ratio,
        max_file_bytes=args.max_file_bytes,
        max_project_bytes=args.max_project_bytes,
        max_upload_bytes=args.max_upload_bytes,
        serve_checkpoints=args.serve_checkpoints,
        private_webhooks=args.private_webhooks,
        require_keys=args.require_keys,
        max_completion_tokens=args.max_completion_tokens,
    )


RECORDER = "reft_ray.telemetry.shared_recorder:recorder_from_environment"


def driver_config(args: ServiceArgs, application: str = DEFAULT_APPLICATION) -> DriverConfig:
    """What drivers are told; they count under the label `application`."""
    return DriverConfig(
        args.database_url,
        args.files_uri,
        args.steps,
        args.options,
        recorder=RECORDER,
        application=application,
        max_file_bytes=args.max_file_bytes,
        max_project_bytes=args.max_project_bytes,
    )


def launcher_of(args: ServiceArgs, application: str = DEFAULT_APPLICATION) -> Launcher:
    """Where drivers run."""
    config = driver_config(args, application)
    if args.job_server is not None:
        return RayLauncher(config, args.job_server, args.driver_cpus)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_RAY_OWN)}
    if ray.is_initialized():
        # Jobs count, screen and train on the cluster that this gateway is part of.
        environment["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    return ProcessLauncher(config, Path(args.logs) if args.logs else None, environment)


def counter_of(args: ServiceArgs) -> Counter:
    """What counts the tokens of training files."""
    counter: Counter = named(args.counter)({name: base.uri for name, base in args.base_models.items()})
    return counter


def _base(args: BaseModelArgs) -> BaseModel:
    return BaseModel(
        uri=args.uri,
        created_at=args.created_at,
        defaults=Defaults(args.n_epochs, args.batch_size, args.min_steps),
        speed=Speed(**args.speed.model_dump()) if args.speed else None,
        devices=args.devices,
        trainable=args.trainable,
    )
