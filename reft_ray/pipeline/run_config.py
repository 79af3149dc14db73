"""The configuration of a run from a job request; requests that would weaken the filter are rejected."""

from __future__ import annotations

from typing import Any

from reft_ray.core.errors import ReftError
from reft_ray.core.verdict import Thresholds
from reft_ray.finetuning.config import FinetuneConfig
from reft_ray.finetuning.teacher_gate import check_teacher
from reft_ray.hf.ref_teacher import RefTeacher
from reft_ray.jobs.job import JobSpec, Options
from reft_ray.jobs.run import JobFailedError, JobRun
from reft_ray.pipeline.config import BaseArgs

INVALID_VALUE = "invalid_value"
TEACHER_NOT_APPROVED = "teacher_not_approved"


def finetune_config(spec: JobSpec, args: BaseArgs, base: str) -> FinetuneConfig:
    """The operator's preset with the user's hyperparameters; `auto` keeps the preset's value."""
    preset = FinetuneConfig.of({"base": base, **args.finetune})
    knobs, options = spec.hyperparameters, spec.options
    values: dict[str, Any] = {"seed": spec.seed}
    if knobs.n_epochs != "auto":
        values["epochs"] = knobs.n_epochs
    if knobs.batch_size != "auto":
        values["batch_rows"] = knobs.batch_size
    if knobs.learning_rate_multiplier != "auto":
        rate = preset.optimizer.learning_rate * knobs.learning_rate_multiplier
        values["optimizer"] = preset.optimizer.model_dump() | {"learning_rate": rate}
    if options.kd_weight is not None:
        values["distill_weight"] = options.kd_weight
    if options.temperature is not None:
        values["temperature"] = options.temperature
    return FinetuneConfig.of(preset.model_dump() | values)


def thresholds_of(options: Options, defaults: Thresholds) -> Thresholds | None:
    """The thresholds that a job requests, None for the teacher's."""
    block = options.threshold
    return None if block is None else Thresholds(min(defaults.review, block), block)


def check_not_weaker(spec: JobSpec, args: BaseArgs, defaults: Thresholds) -> None:
    """Raise JobFailedError for a laxer filter or less distillation than the operator configured."""
    options = spec.options
    if options.policy == "review" and args.screening.withheld == "hash":
        raise JobFailedError(
            INVALID_VALUE,
            "reft.policy: this service keeps no text of withheld rows, so that people cannot review them; "
            "use filter or fail.",
            "reft.policy",
        )
    if options.threshold is not None and options.threshold > defaults.block:
        raise JobFailedError(
            INVALID_VALUE,
            f"reft.threshold: {options.threshold:g} is above the teacher's block threshold of {defaults.block:.4f}; "
            "a job may be stricter than the service, not laxer.",
            "reft.threshold",
        )
    least = FinetuneConfig.of({"base": "any", **args.finetune}).distill_weight
    if options.kd_weight is not None and options.kd_weight < least:
        raise JobFailedError(
            INVALID_VALUE,
            f"reft.kd_weight: {options.kd_weight:g} is below the service's {least:g}; "
            "a job may distil more than the service, not less.",
            "reft.kd_weight",
        )


def check_may_teach(run: JobRun, config: FinetuneConfig, teacher: RefTeacher) -> None:
    """Raise JobFailedError if the teacher's answers do not meet its limits; an event if they were never measured."""
    try:
        warning = check_teacher(config, teacher)
    except ReftError as error:
        raise JobFailedError(TEACHER_NOT_APPROVED, f"The service's teacher was not approved: {error}") from None
    if warning:
        run.event(f"{warning[0].upper()}{warning[1:]}", level="warn", key="validate/teacher")
