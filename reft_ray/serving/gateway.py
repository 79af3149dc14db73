"""The gateway replica: the HTTP API over handles to the teachers and the students."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle

from reft_ray.api.filter_app import create_filter_app, freeze_startup
from reft_ray.api.keyed_filter import create_keyed_filter
from reft_ray.jobs.database import Database
from reft_ray.jobs.driver import resolved
from reft_ray.serving.args import ServeArgs, from_environment
from reft_ray.serving.chat import chat_of
from reft_ray.serving.finetuning_service import finetuning_app
from reft_ray.serving.handle import moderator_of
from reft_ray.serving.measured_chat import MeasuredChat
from reft_ray.telemetry import catalog, logs
from reft_ray.telemetry.metric_types import Labeller
from reft_ray.telemetry.ray_recorder import RayRecorder


class Gateway:
    """Made a deployment in `app`. Serve builds the ASGI application in the replica's process.

    It never calls the `trainers`: they are arguments so that Serve deploys them with it.
    """

    def __init__(
        self,
        teachers: DeploymentHandle,
        args: dict[str, Any],
        students: Mapping[str, DeploymentHandle] | None = None,
        guards: Sequence[DeploymentHandle] = (),
        trainers: Sequence[DeploymentHandle] = (),
    ) -> None:
        logs.configure()
        self._args = ServeArgs.model_validate(args)
        self._recorder = RayRecorder(Labeller(application=self._args.application))
        self._recorder.set(catalog.BUILD_INFO, 1, version=version("reft-ray"), python=platform.python_version())
        self._moderator = moderator_of(teachers, guards, self._args.cascade, self._recorder)
        self._students = students or {}

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = self._application()
        freeze_startup()
        return app

    def _application(self) -> FastAPI:
        service = self._args.service
        if service is not None:
            chat = MeasuredChat(chat_of(service, self._students), self._recorder)
            return finetuning_app(self._args, service, self._moderator, chat, self._recorder)
        options: dict[str, Any] = {
            "screenings_uri": self._args.screenings_uri,
            "recorder": self._recorder,
            "metrics_token": from_environment(self._args.metrics_token_variable),
        }
        if self._args.keys is None:
            return create_filter_app(self._moderator, self._args.filter, **options)
        database = Database.open(resolved(self._args.keys.database_url))
        return create_keyed_filter(self._moderator, database, self._args.filter, **options)
