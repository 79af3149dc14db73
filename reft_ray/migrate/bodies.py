"""From a job at OpenAI to the body of a job here, with every difference named before anything runs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from reft_ray.api.errors import ApiError
from reft_ray.api.job_schema import parse
from reft_ray.api.settings import BaseModelSettings, ServiceSettings

_KEPT = ("training_file", "validation_file", "seed", "metadata", "integrations", "method", "hyperparameters")
_ESSENTIAL = ("model", "training_file", "method", "method.type")
"""Without these a job would be another one."""
MOST_DEVIATIONS = 100


class Deviation(NamedTuple):
    """A parameter that a job here does not have, or has with another value."""

    field: str
    message: str


@dataclass(frozen=True)
class PlannedJob:
    """A job to create: its body, None where it cannot be created here, and what is different."""

    body: dict[str, Any] | None
    deviations: list[Deviation] = field(default_factory=list)


def body_of(job: Mapping[str, Any]) -> dict[str, Any]:
    """The body that created a job, from the job itself."""
    body = {"model": job.get("model"), **{name: job[name] for name in _KEPT if job.get(name) not in (None, [], {})}}
    method = body.get("method")
    if isinstance(method, dict):
        # A job repeats the hyperparameters of its method at the top.
        body.pop("hyperparameters", None)
    if suffix := _suffix(job):
        body["suffix"] = suffix
    return body


def plan(body: Mapping[str, Any], models: Mapping[str, str]) -> PlannedJob:
    """The body here. `models` maps base models to ours; `*` is for all others."""
    planned = copy.deepcopy(dict(body))
    deviations: list[Deviation] = []
    asked = str(planned.get("model"))
    ours = models.get(asked) or models.get("*")
    if ours is None:
        message = f"no model is named for {asked}; add --model {asked}=OURS"
        return PlannedJob(None, [Deviation("model", message)])
    if ours != asked:
        continues = " from its base, not from where the finetuned model was" if asked.startswith("ft:") else ""
        deviations.append(Deviation("model", f"{asked} becomes {ours}{continues}"))
    planned["model"] = ours
    settings = ServiceSettings(base_models={ours: BaseModelSettings(uri="-")})
    while len(deviations) < MOST_DEVIATIONS:
        try:
            parse(planned, settings)
        except ApiError as error:
            name = error.param or ""
            essential = name in _ESSENTIAL or not _remove(planned, name.split("."))
            deviations.append(Deviation(name, error.message + ("" if essential else " It is left out.")))
            if essential:
                return PlannedJob(None, deviations)
        else:
            return PlannedJob(planned, deviations)
    return PlannedJob(None, deviations)


def _remove(values: dict[str, Any], path: list[str]) -> bool:
    """Remove the parameter at a path, or the nearest one above it; False where there is none."""
    holder, name = values, path[0]
    for step in path[1:]:
        inner = holder.get(name)
        if not isinstance(inner, dict) or step not in inner:
            break
        holder, name = inner, step
    return holder.pop(name, values) is not values


def _suffix(job: Mapping[str, Any]) -> str:
    """The suffix of a job: `ft:BASE:ORGANIZATION:SUFFIX:ID`, or what the user gave."""
    given = job.get("user_provided_suffix") or job.get("suffix")
    parts = str(job.get("fine_tuned_model") or "").split(":")
    return str(given or (parts[3] if len(parts) == 5 else ""))
