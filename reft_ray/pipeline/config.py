"""The operator's configuration of a base model for jobs: teacher, alignment rows, release gate, preset, resources."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from reft_ray.core.job_threshold import FLOOR
from reft_ray.evaluation.gate import DEFAULT_LIMITS, Bound, Limit
from reft_ray.evaluation.judge_settings import MATCHER_ONLY, JudgeSettings, check_names
from reft_ray.evaluation.suite import FINETUNE_ACCURACY
from reft_ray.evaluation.task_accuracy import Match
from reft_ray.finetuning.config import FinetuneConfig, Resources
from reft_ray.guards.settings import CascadeSettings
from reft_ray.settings import Settings

_BOUNDS: Mapping[str, Bound] = {limit.measure: limit.bound for limit in DEFAULT_LIMITS}


class AlignmentArgs(Settings):
    """Alignment rows: JSONL files as `reft-ray finetune` reads them, or the built-in synthetic ones."""

    builtin: bool = False
    labelled: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()
    helpful: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not (self.builtin or self.labelled or self.refusals or self.helpful):
            raise ValueError("name files under labelled, refusals or helpful")
        return self


class GateArgs(Settings):
    """The release gate. `limits` are percentages by measure: see `evaluation.gate.DEFAULT_LIMITS`.

    `finetune_accuracy` is how far the student may fall below the base on the validation file; jobs without one skip it.
    `harmful` and `harmless` are JSONL files of prompts, or `builtin`; at most `prompts` of each are used. Of several
    `judges` the first decides; all are in the report.
    """

    harmful: str
    harmless: str
    limits: Mapping[str, float] = Field(default_factory=lambda: {item.measure: item.value for item in DEFAULT_LIMITS})
    match: Match = Match.EXACT
    prompts: int = Field(300, ge=1)
    max_new_tokens: int = Field(256, ge=1)
    batch_tokens: int = Field(8192, ge=1)
    judges: tuple[JudgeSettings, ...] = MATCHER_ONLY

    @field_validator("judges")
    @classmethod
    def _named(cls, judges: tuple[JudgeSettings, ...]) -> tuple[JudgeSettings, ...]:
        check_names(judges)
        return judges

    @field_validator("limits")
    @classmethod
    def _known(cls, limits: Mapping[str, float]) -> Mapping[str, float]:
        if limits.keys() != _BOUNDS.keys():
            raise ValueError(f"name a limit for each of {', '.join(_BOUNDS)}, and nothing else")
        return limits

    def bounds(self, tighter: Mapping[str, float], validated: bool) -> tuple[Limit, ...]:
        """The limits of one job: the operator's, or the user's where those are tighter."""
        return tuple(
            Limit(name, _BOUNDS[name], min(value, tighter.get(name, value)))
            for name, value in self.limits.items()
            if validated or name != FINETUNE_ACCURACY
        )


class ScreeningArgs(Settings):
    """Screening: files of up to `small_rows` rows are screened in the driver, larger ones by Ray actors.

    `job_threshold`: rows above the threshold that the file's own scores give are withheld for review as well; it is
    never above the teacher's nor below `job_threshold_floor`. People also review a random sample of `kept_sample` kept
    rows, which estimates what the teacher misses. `cascade` has the guards that judge rows next to the teacher.
    With `withheld: hash` no text of a withheld row is stored: the report has its id, a hash, and the evidence. People
    then have nothing to read, so a job's policy cannot be `review`.
    """

    small_rows: int = Field(10_000, ge=0)
    actors: int = Field(1, ge=1)
    cpus_per_actor: float = Field(1.0, ge=0)
    gpus_per_actor: float = Field(0.0, ge=0)
    batch_rows: int = Field(256, ge=1)
    findings: bool = True
    job_threshold: bool = True
    job_threshold_floor: float = Field(FLOOR, ge=-1, le=1)
    kept_sample: int = Field(20, ge=0, le=1000)
    withheld: Literal["text", "hash"] = "text"
    cascade: CascadeSettings = CascadeSettings()


class BaseArgs(Settings):
    """A base model that users may finetune.

    - `base` and `teacher` are directories (`builtin`: those that `reft-ray serve` trains); without `base` it is the
      model that the teacher was trained from. Exported adapters name the base by its public name, `published`.
    - `alignment` maps names to sets; a job that names none uses `default_alignment`.
    - `finetune` is the preset, in keys of FinetuneConfig; `auto` in a job means its values.
    """

    teacher: str
    base: str | None = None
    published: str | None = None
    licence: str | None = None
    alignment: Mapping[str, AlignmentArgs] = Field(min_length=1)
    default_alignment: str = "default"
    gate: GateArgs
    finetune: Mapping[str, Any] = Field(default_factory=dict)
    resources: Resources = Resources()
    screening: ScreeningArgs = ScreeningArgs()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.default_alignment not in self.alignment:
            raise ValueError(f"default_alignment {self.default_alignment!r} is not one of the alignment sets")
        set_by_job = sorted({"base", "seed"} & set(self.finetune))
        if set_by_job:
            raise ValueError(f"finetune.{set_by_job[0]} is set by each job")
        FinetuneConfig.of({"base": "any", **self.finetune})
        if self.resources.storage is not None:
            raise ValueError("resources.storage is set by each job")
        return self
