"""Strict validation of Serve config files; Serve itself drops keys that it does not know."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from ray.serve.config import AutoscalingConfig, BackpressureConfig, RequestRouterConfig
from ray.serve.schema import LoggingConfig, ServeDeploySchema

from reft_ray.core.errors import UsageError
from reft_ray.serving.args import ServeArgs, ServiceArgs, TeacherArgs
from reft_ray.serving.finetuning_service import driver_config
from reft_ray.settings import hint, load_factory, mistakes, model_in

IMPORT_PATH = "reft_ray.serving.app:build_app"
LOOPBACK = "127.0.0.1"
"""Where Serve listens without `http_options.host`."""
_DEPLOYMENTS = ("Gateway", "Teacher", "Student", "Trainer")
_NUMBERED = re.compile(r"(?<=Student|Trainer)-[1-9]\d*$")
"""Students of the second base are `Student-1`, and so on; its trainer is `Trainer-1`."""
# Serve declares these as dictionaries in its schema, or as a union with one; their keys are checked too.
_MODELS: dict[str, type[BaseModel]] = {
    "autoscaling_config": AutoscalingConfig,
    "backpressure_config": BackpressureConfig,
    "request_router_config": RequestRouterConfig,
    "logging_config": LoggingConfig,
}


def check_serve_config(config: Mapping[str, Any]) -> list[str]:
    """The mistakes in a Serve config (the parsed YAML), one line each.

    Checks the keys of Serve's schema at every depth and our application's arguments; if these are right, Serve's
    schema itself.
    """
    found = list(_unknown(ServeDeploySchema, config, "config"))
    http = config.get("http_options")
    host = str(http.get("host", LOOPBACK)) if isinstance(http, Mapping) else LOOPBACK
    for index, application in enumerate(_applications(config)):
        if application.get("import_path") == IMPORT_PATH:
            found += _our_mistakes(application, f"config.applications.{index}", host)
    if found:
        return found
    try:
        ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        found = mistakes(ServeDeploySchema, error, "config")
    return found


def config_schema(options: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a Serve config with our applications, for editors; `check_serve_config` checks more.

    `options` are those of the steps of a job.
    """
    schema = _closed(ServeDeploySchema.model_json_schema())
    definitions = schema["$defs"]
    for model in (ServeArgs, options):
        own = model.model_json_schema()
        definitions |= own.pop("$defs", {})
        definitions[model.__name__] = own
    definitions["ServiceArgs"]["properties"]["options"] |= {"$ref": f"#/$defs/{options.__name__}"}
    application = definitions["ServeApplicationSchema"]
    application["if"] = {"properties": {"import_path": {"const": IMPORT_PATH}}, "required": ["import_path"]}
    application["then"] = {"properties": {"args": {"$ref": "#/$defs/ServeArgs"}}}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """Serve's schema without the keys that it ignores; those of its dictionaries are their owner's."""
    for part in (schema, *schema["$defs"].values()):
        if part.get("properties"):
            part.setdefault("additionalProperties", False)
    return schema


def _applications(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    applications = config.get("applications")
    return [item for item in applications if isinstance(item, Mapping)] if isinstance(applications, list) else []


def _our_mistakes(application: Mapping[str, Any], where: str, host: str) -> Iterator[str]:
    try:
        args = ServeArgs.model_validate(application.get("args", {}))
    except ValidationError as error:
        yield from mistakes(ServeArgs, error, f"{where}.args")
    else:
        try:
            args.check_bind(host)
        except UsageError as error:
            yield f"config.http_options.{error}"
        if args.service is not None:
            yield from _step_mistakes(args.service, f"{where}.args.service")
    for index, deployment in enumerate(application.get("deployments") or ()):
        name = deployment.get("name") if isinstance(deployment, Mapping) else None
        at = f"{where}.deployments.{index}"
        if _NUMBERED.sub("", str(name)) not in _DEPLOYMENTS:
            yield f"{at}.name: unknown deployment {name}, {hint(str(name), _DEPLOYMENTS)}"
        elif "user_config" in deployment:
            if name == "Teacher":
                try:
                    TeacherArgs.model_validate(deployment["user_config"])
                except ValidationError as error:
                    yield from mistakes(TeacherArgs, error, f"{at}.user_config")
            else:
                yield f"{at}.user_config: {name} has none"


def _step_mistakes(service: ServiceArgs, where: str) -> Iterator[str]:
    """Check the options of the steps, which only their factory knows."""
    try:
        load_factory(service.steps)
    except UsageError as error:
        yield f"{where}.steps: {error}"
        return
    try:
        driver_config(service).make_steps()
    except UsageError as error:
        yield from (f"{where}.options.{mistake}" for mistake in str(error).split("; "))
    except TypeError as error:
        yield f"{where}.options: {error}"


def _unknown(model: type[BaseModel], value: Any, where: str) -> Iterator[str]:
    if not isinstance(value, Mapping):
        return
    for key, item in value.items():
        field = model.model_fields.get(key)
        if field is None:
            yield f"{where}.{key}: unknown key, {hint(str(key), model.model_fields)}"
            continue
        inner = _MODELS.get(key) or model_in(field.annotation)
        if inner is not None:
            for position, part in enumerate(item) if isinstance(item, list) else ((None, item),):
                yield from _unknown(inner, part, f"{where}.{key}" + ("" if position is None else f".{position}"))
