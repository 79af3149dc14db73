"""The replica that speaks HTTP: the API's application over a handle to the teachers."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle

from reft_ray.api.app import create_app
from reft_ray.serving.args import ServeArgs, from_environment
from reft_ray.serving.chat import chat_of
from reft_ray.serving.handle import HandleModerator
from reft_ray.serving.jobs import service_app
from reft_ray.telemetry import catalog, logs
from reft_ray.telemetry.metric_types import Labeller
from reft_ray.telemetry.ray_recorder import RayRecorder


class Gateway:
    """Made a deployment in `app`; Serve asks it for its application once it is in its own process."""

    def __init__(
        self,
        teachers: DeploymentHandle,
        args: dict[str, Any],
        students: Mapping[str, DeploymentHandle] | None = None,
    ) -> None:
        logs.configure()
        self._args = ServeArgs.model_validate(args)
        self._recorder = RayRecorder(Labeller(application=self._args.application))
        self._recorder.set(catalog.BUILD_INFO, 1, version=version("reft-ray"), python=platform.python_version())
        self._judge = HandleModerator(teachers, self._recorder)
        self._students = students or {}

    def __serve_build_asgi_app__(self) -> FastAPI:
        if self._args.service is not None:
            chat = chat_of(self._args.service, self._students)
            return service_app(self._args, self._judge, chat, self._recorder)
        return create_app(
            self._judge,
            self._args.filter.settings(),
            screenings_uri=self._args.screenings_uri,
            recorder=self._recorder,
            metrics_token=from_environment(self._args.metrics_token_variable),
        )
