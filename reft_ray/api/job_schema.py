"""The body of a finetuning job: OpenAI's fields and the `reft` extension."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator

from reft_ray.api.errors import ApiError, invalid
from reft_ray.api.settings import ServiceSettings
from reft_ray.jobs.job import Hyperparameters, JobSpec, Options
from reft_ray.rows.format import Format
from reft_ray.settings import Settings, nearest

MAX_SEED = 2147483647

# PostgreSQL can store a NUL in JSON but not read it back.
Key = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[^\x00]*$")]
Value = Annotated[str, StringConstraints(max_length=512, pattern=r"^[^\x00]*$")]


class Strict(Settings):
    """A part of a request in which unknown keys are errors."""

    # PostgreSQL stores no infinity in JSON, and SQLite cannot read one.
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class HyperparametersBody(Strict):
    """OpenAI's hyperparameters; null means `auto`."""

    n_epochs: Literal["auto"] | Annotated[int, Field(ge=1, le=50)] = "auto"
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=256)] = "auto"
    learning_rate_multiplier: Literal["auto"] | Annotated[float, Field(gt=0, le=100)] = "auto"

    @field_validator("*", mode="before")
    @classmethod
    def _null_is_auto(cls, value: object) -> object:
        return "auto" if value is None else value


class SupervisedBody(Strict):
    """The settings of the supervised method."""

    hyperparameters: HyperparametersBody = Field(default_factory=HyperparametersBody)


class MethodBody(BaseModel):
    """The method; settings of unsupported methods are not read."""

    type: str
    supervised: SupervisedBody | None = None


class GateBody(Strict):
    """Limits of the release gate in percentage points, at most the operator's.

    `finetune_accuracy` limits the drop below the base model; the others are maxima.
    """

    harmful_score: float | None = Field(None, ge=0)
    incoherent: float | None = Field(None, ge=0)
    over_refusal: float | None = Field(None, ge=0)
    finetune_accuracy: float | None = Field(None, ge=0)


class ReftBody(Strict):
    """Our extension: `extra_body={"reft": {...}}`."""

    policy: Literal["filter", "review", "fail"] = "filter"
    max_reject_ratio: float | None = Field(None, ge=0, le=1)
    threshold: float | None = Field(None, ge=-1, le=1)
    kd_weight: float | None = Field(None, ge=0)
    temperature: float | None = Field(None, gt=0)
    alignment_dataset: str | None = None
    format: Literal[tuple(Format)] | None = None  # type: ignore[valid-type]
    columns: dict[Key, Key] = Field(default_factory=dict, max_length=32)
    speakers: dict[Key, Literal["system", "user", "assistant", "tool"]] = Field(default_factory=dict, max_length=32)
    skip_invalid: bool = False
    gate: GateBody = Field(default_factory=GateBody)


class JobBody(Strict):
    """The body of `POST /fine_tuning/jobs`."""

    model: str
    training_file: str
    validation_file: str | None = None
    suffix: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$")] | None = None
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    metadata: dict[Key, Value] | None = Field(None, max_length=16)
    integrations: list[Any] | None = None
    method: MethodBody | None = None
    hyperparameters: HyperparametersBody | None = None
    reft: ReftBody = Field(default_factory=ReftBody)


def parse(body: object, settings: ServiceSettings) -> tuple[JobSpec, dict[str, str]]:
    """Parse a request body into the job's spec and metadata. Raises ApiError 400 naming the field."""
    if not isinstance(body, dict):
        raise invalid("The body must be a JSON object.")
    try:
        request = JobBody.model_validate(body)
    except ValidationError as error:
        raise _refusal(error) from None
    base = settings.base_models.get(request.model)
    if base is None or not base.trainable:
        known = ", ".join(name for name, entry in settings.base_models.items() if entry.trainable)
        raise invalid(
            f"Model {request.model[:128]!r} is not available for fine-tuning; choose from: {known}.",
            "model",
            "model_not_available",
        )
    if request.integrations:
        raise invalid(
            "Integrations are not supported; the job's events and step_metrics.csv have its metrics.",
            "integrations",
            "unsupported_integration",
        )
    method = request.method
    if method is not None and method.type != "supervised":
        raise invalid(
            f"Method {method.type[:32]!r} is not supported; use 'supervised'.", "method.type", "unsupported_method"
        )
    if method is not None and method.supervised is not None:
        hyperparameters = method.supervised.hyperparameters
    else:
        hyperparameters = request.hyperparameters or HyperparametersBody()
    spec = JobSpec(
        model=request.model,
        training_file=request.training_file,
        validation_file=request.validation_file,
        seed=secrets.randbelow(MAX_SEED + 1) if request.seed is None else request.seed,
        suffix=request.suffix,
        hyperparameters=Hyperparameters(**hyperparameters.model_dump()),
        options=_options(request.reft, settings),
        preset=base.preset,
    )
    return spec, dict(request.metadata or {})


def _options(reft: ReftBody, settings: ServiceSettings) -> Options:
    gate = reft.gate.model_dump(exclude_none=True)
    for name, limit in gate.items():
        operator = settings.gate.get(name)
        if operator is not None and limit > operator:
            raise invalid(
                f"reft.gate.{name}: {limit:g} is above the operator's limit of {operator:g}.", f"reft.gate.{name}"
            )
    ratio = settings.max_reject_ratio if reft.max_reject_ratio is None else reft.max_reject_ratio
    if ratio > settings.max_reject_ratio:
        raise invalid(
            f"reft.max_reject_ratio: {ratio:g} is above the operator's limit of {settings.max_reject_ratio:g}.",
            "reft.max_reject_ratio",
        )
    dataset = reft.alignment_dataset
    if dataset is not None and dataset not in settings.alignment_datasets:
        known = ", ".join(sorted(settings.alignment_datasets)) or "only the preset's own"
        raise invalid(
            f"reft.alignment_dataset: {dataset[:64]!r} is unknown; available: {known}.", "reft.alignment_dataset"
        )
    return Options(
        policy=reft.policy,
        max_reject_ratio=ratio,
        threshold=reft.threshold,
        kd_weight=reft.kd_weight,
        temperature=reft.temperature,
        alignment_dataset=dataset,
        format=reft.format,
        columns=reft.columns,
        speakers=reft.speakers,
        skip_invalid=reft.skip_invalid,
        gate=gate,
    )


_UNIONS = ("int", "float", "constrained-int", "constrained-float", "literal['auto']")


def _refusal(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_input=False)[0]
    path = _field(first)
    param = ".".join(path)[:128]
    if first["type"] == "missing":
        return invalid(f"Missing required parameter: '{param}'.", param, "missing_required_parameter")
    if first["type"] == "extra_forbidden":
        return invalid(f"Unknown parameter: '{param}'.{_suggestion(path)}", param, "unknown_parameter")
    return invalid(f"Invalid value for '{param}': {_message(first, error)}.", param)


def _field(error: Mapping[str, Any]) -> list[str]:
    """The path of the field that an error is about, without the members of a union."""
    return [str(part) for part in error["loc"] if str(part) not in _UNIONS]


def _message(first: Mapping[str, Any], error: ValidationError) -> str:
    # A union reports an error per member; together they say what is accepted.
    field = _field(first)
    same = [item["msg"] for item in error.errors(include_url=False, include_input=False) if _field(item) == field]
    return str(first["msg"]) if len(same) == 1 else "; or ".join(dict.fromkeys(same))


def _suggestion(path: list[str]) -> str:
    sections: dict[str, type[BaseModel]] = {
        "": JobBody,
        "reft": ReftBody,
        "reft.gate": GateBody,
        "hyperparameters": HyperparametersBody,
        "method.supervised.hyperparameters": HyperparametersBody,
    }
    section, key = ".".join(path[:-1]), path[-1]
    here = sections.get(section)
    if here and (near := nearest(key, here.model_fields)):
        return f" Did you mean '{'.'.join([*path[:-1], near])}'?"
    for name, other in sections.items():
        if key in other.model_fields:
            return f" Did you mean '{name}.{key}'?" if name else f" Did you mean '{key}' at the top level?"
    return ""
