"""The finetuning service of a gateway: its stores, its reconciler and its launcher, from the operator's arguments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI

from reft_ray.api.chat_model import ChatModel
from reft_ray.api.moderator import Moderator
from reft_ray.api.service_app import create_service_app
from reft_ray.api.stores import Stores
from reft_ray.console.oidc import OpenIdProvider
from reft_ray.console.site import install_console
from reft_ray.jobs.database import Database
from reft_ray.jobs.driver import CONFIG_VARIABLE, DriverConfig, resolved
from reft_ray.jobs.estimate import Counter
from reft_ray.jobs.launcher import Launcher, ProcessLauncher
from reft_ray.jobs.speeds import measured_speed
from reft_ray.serving.args import PIPELINE, ServeArgs, ServiceArgs, from_environment
from reft_ray.serving.kube_launcher import KubeLauncher
from reft_ray.serving.ray_launcher import RayLauncher
from reft_ray.settings import load_factory
from reft_ray.telemetry.metric_types import DEFAULT_APPLICATION
from reft_ray.telemetry.recorder import Recorder

RECORDER = "reft_ray.telemetry.shared_recorder:recorder_from_environment"

_RAY_WORKER_VARIABLES = (
    "RAY_RAYLET",
    "RAY_NODE",
    "RAY_JOB",
    "RAY_SERVE",
    "RAY_LD",
    "RAY_WORKER",
    "RAY_SESSION",
    "RAY_GCS",
)
"""Prefixes of what Ray sets for its workers; a driver that a worker starts is not one."""


def finetuning_app(
    args: ServeArgs, service: ServiceArgs, moderator: Moderator, chat: ChatModel, recorder: Recorder
) -> FastAPI:
    """The filter and the finetuning service; jobs are reconciled while the application runs.

    Raises UsageError for options that the steps reject: once here, instead of in the driver of every job.
    """
    driver_config(service).make_steps()
    database = Database.open(resolved(service.database_url))
    stores = Stores.open(database, service.files_uri, service, counter_of(service), recorder)
    launcher = launcher_of(service, args.application)
    if isinstance(launcher, ProcessLauncher):
        start_measuring(service, stores)
    app = create_service_app(
        moderator,
        stores,
        chat,
        args.filter,
        screenings_uri=args.screenings_uri,
        recorder=recorder,
        metrics_token=from_environment(args.metrics_token_variable),
        launcher=launcher,
        slots=service.slots,
    )
    provider = None if service.oidc is None else OpenIdProvider(service.oidc)
    install_console(app, stores, moderator, chat, quality=_quality(args.teacher.teacher), oidc=provider)
    return app


def _quality(teacher: str) -> dict[str, Any]:
    """The teacher's figures at calibration, for the console; nothing where its files are not on this machine."""
    try:
        found: dict[str, Any] = json.loads((Path(teacher) / "teacher.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def driver_config(service: ServiceArgs, application: str = DEFAULT_APPLICATION) -> DriverConfig:
    """The configuration of drivers; their metrics have the label `application`."""
    return DriverConfig(
        service.database_url,
        service.files_uri,
        service.steps,
        service.options,
        recorder=RECORDER,
        application=application,
        max_file_bytes=service.max_file_bytes,
        max_project_bytes=service.max_project_bytes,
        sign_releases=service.sign_releases,
    )


def start_measuring(service: ServiceArgs, stores: Stores) -> subprocess.Popen[bytes] | None:
    """Start to measure the base models that have no speed yet, in a process of its own; None where all have one.

    Only where drivers are processes of this machine: elsewhere the operator runs the same command on their nodes.
    """
    models = [
        name
        for name, base in service.base_models.items()
        if base.trainable
        and base.speed is None
        and stores.first_speeds.of(name) is None
        and measured_speed(stores.database, name, base.preset) is None
    ]
    if not (service.measure_speed and service.steps == PIPELINE and models):
        return None
    environment = {**_driver_environment(), CONFIG_VARIABLE: driver_config(service).to_json()}
    log = Path(service.logs or os.devnull)
    if service.logs:
        log.mkdir(parents=True, exist_ok=True)
        log /= "speed.log"
    with log.open("ab") as said:
        process = subprocess.Popen(  # noqa: S603 - our own module
            [sys.executable, "-m", "reft_ray.pipeline.speed", *models],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
        )
    threading.Thread(target=process.wait, name="measuring", daemon=True).start()
    return process


def _driver_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(_RAY_WORKER_VARIABLES)}


def launcher_of(service: ServiceArgs, application: str = DEFAULT_APPLICATION) -> Launcher:
    """Launch drivers as RayJobs, as Ray jobs of a job server, or as processes where neither is configured."""
    config = driver_config(service, application)
    if service.job_template is not None:
        return KubeLauncher.in_pod(config, service.job_template)
    if service.job_server is not None:
        return RayLauncher(config, service.job_server, service.driver_cpus)
    environment = _driver_environment()
    if ray.is_initialized():
        # Jobs run on the cluster that this gateway is part of.
        environment["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    return ProcessLauncher(config, Path(service.logs) if service.logs else None, environment)


def counter_of(service: ServiceArgs) -> Counter:
    """The counter of training files' tokens."""
    counter: Counter = load_factory(service.counter)({name: base.uri for name, base in service.base_models.items()})
    return counter
