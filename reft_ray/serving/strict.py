"""A strict reading of Serve config files, because Serve's own drops keys that it does not know."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from ray.serve.config import AutoscalingConfig, BackpressureConfig, RequestRouterConfig
from ray.serve.schema import LoggingConfig, ServeDeploySchema

from reft_ray.core.errors import UsageError
from reft_ray.serving.args import ServeArgs, ServiceArgs, TeacherArgs, problems, suggestion
from reft_ray.serving.jobs import driver_config

IMPORT_PATH = "reft_ray.serving.app:build_app"
_DEPLOYMENTS = ("Gateway", "Teacher", "Student")
_NUMBERED = re.compile(r"(?<=Student)-[1-9]\d*$")
"""Students of the second base are `Student-1`, and so on."""
# Serve declares these as plain dictionaries in its schema, or beside one; their keys are checked all the same.
_MODELS: dict[str, type[BaseModel]] = {
    "autoscaling_config": AutoscalingConfig,
    "backpressure_config": BackpressureConfig,
    "request_router_config": RequestRouterConfig,
    "logging_config": LoggingConfig,
}


def check_serve_config(config: Mapping[str, Any]) -> list[str]:
    """What is wrong with a Serve config (the parsed YAML), one line each; an empty list when nothing is.

    Checks the keys of Serve's schema at every depth, the arguments of our application, and then Serve's own reading.
    """
    found = list(_unknown(ServeDeploySchema, config, "config"))
    for index, application in enumerate(_applications(config)):
        if application.get("import_path") == IMPORT_PATH:
            found += _ours(application, f"config.applications.{index}")
    if found:
        return found
    try:
        ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        found = [f"config.{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
    return found


def _applications(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    applications = config.get("applications")
    return [item for item in applications if isinstance(item, Mapping)] if isinstance(applications, list) else []


def _ours(application: Mapping[str, Any], where: str) -> Iterator[str]:
    found = problems(ServeArgs, application.get("args", {}), f"{where}.args")
    yield from found or _steps(ServeArgs.model_validate(application.get("args", {})).service, f"{where}.args.service")
    for index, deployment in enumerate(application.get("deployments") or ()):
        name = deployment.get("name") if isinstance(deployment, Mapping) else None
        at = f"{where}.deployments.{index}"
        if _NUMBERED.sub("", str(name)) not in _DEPLOYMENTS:
            yield f"{at}.name: unknown deployment {name}{suggestion(str(name), list(_DEPLOYMENTS))}"
        elif "user_config" in deployment:
            if name == "Teacher":
                yield from problems(TeacherArgs, deployment["user_config"], f"{at}.user_config")
            else:
                yield f"{at}.user_config: {name} takes none"


def _steps(service: ServiceArgs | None, where: str) -> Iterator[str]:
    """The steps' own options, which only their factory knows."""
    if service is None:
        return
    try:
        driver_config(service).make_steps()
    except UsageError as error:
        yield from (f"{where}.options.{mistake}" for mistake in str(error).split("; "))
    except (ImportError, AttributeError, TypeError) as error:
        yield f"{where}.steps: {error}"


def _unknown(model: type[BaseModel], value: Any, where: str) -> Iterator[str]:
    if not isinstance(value, Mapping):
        return
    for key, item in value.items():
        field = model.model_fields.get(key)
        if field is None:
            yield f"{where}.{key}: unknown key{suggestion(str(key), list(model.model_fields))}"
            continue
        inner = _MODELS.get(key) or _inner(field.annotation)
        if inner is not None:
            for position, part in enumerate(item) if isinstance(item, list) else ((None, item),):
                yield from _unknown(inner, part, f"{where}.{key}" + ("" if position is None else f".{position}"))


def _inner(annotation: Any) -> type[BaseModel] | None:
    """The model inside `X | None`, `list[X]` and the like."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    return next((model for part in typing.get_args(annotation) if (model := _inner(part)) is not None), None)
