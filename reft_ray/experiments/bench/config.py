"""The configuration of a comparison: rows, base, teacher, how students are trained, and the cells of the grid."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from reft_ray.core.errors import UsageError
from reft_ray.evaluation.judge_settings import MATCHER_ONLY, JudgeSettings, check_names
from reft_ray.experiments.bench.methods import METHODS
from reft_ray.finetuning.config import FinetuneConfig, TeacherConfig
from reft_ray.settings import Settings, all_known
from reft_ray.testbed.base_model import Recipe
from reft_ray.testbed.synthetic import Sizes


class Block(Settings):
    """A product of cells; a grid is the union of its blocks. `filters`: without and with the Ref-Teacher's filter."""

    methods: tuple[str, ...] = Field(min_length=1)
    tasks: tuple[str, ...] = Field(min_length=1)
    harmful_ratios: tuple[float, ...] = (0.0, 0.1, 0.3)
    sizes: tuple[int, ...] = (1000,)
    seeds: tuple[int, ...] = (0,)
    filters: tuple[bool, ...] = (False,)

    @field_validator("methods")
    @classmethod
    def _known(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        return all_known("method", methods, METHODS)

    @field_validator("harmful_ratios")
    @classmethod
    def _shares(cls, ratios: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0.0 <= ratio <= 1.0 for ratio in ratios):
            raise ValueError("a harmful ratio is a share in [0, 1]")
        return ratios


class Evaluated(Settings):
    """The most prompts of each kind that a student answers, and the longest answer in tokens."""

    harmful: int = Field(300, ge=1)
    harmless: int = Field(300, ge=1)
    task: int = Field(300, ge=1)
    max_new_tokens: int = Field(24, ge=1)


class Edits(Settings):
    """Settings of the defences that edit rows or weights; see `reft_ray.baselines`."""

    safe_instruct_share: float = Field(0.1, ge=0)
    larf_references: int = Field(100, ge=1)
    larf_drop_share: float = Field(0.2, ge=0, lt=1)
    safe_lora_threshold: float = Field(0.5, ge=-1, le=1)
    antidote_dense: float = Field(0.1, ge=0, lt=1)
    antidote_rows: int = Field(1000, ge=1)


class BenchConfig(Settings):
    """`rows` is a folder with `data/` (see `experiments.real_rows`); without it rows are synthetic.

    `teacher` is a finished artefact; without it a teacher is trained once with `teacher_settings`. `student` and
    `alignment_stage` are FinetuneConfig keys of the students and of the aligned adapters that some baselines train
    first. `builtin_sizes` and `recipe` configure the synthetic rows and the built-in base model.
    """

    name: str
    rows: str | None = None
    base: str | None = None
    teacher: str | None = None
    teacher_settings: dict[str, Any] = Field({})
    student: dict[str, Any] = Field({})
    alignment_stage: dict[str, Any] = Field({})
    alignment: str | None = Field(None, description="a file of labelled rows with answers; default: the provider's")
    alignment_rows: int = Field(2000, ge=2, description="refusals and helpful answers, half each")
    blocks: tuple[Block, ...] = Field(min_length=1)
    edits: Edits = Edits()
    evaluation: Evaluated = Evaluated()
    judges: tuple[JudgeSettings, ...] = Field(MATCHER_ONLY, description="of harmful answers: the first decides")
    builtin_sizes: Sizes = Sizes()
    recipe: Recipe = Recipe()
    device: Literal["cpu", "cuda"] = "cpu"
    count_flops: bool = Field(False, description="in every cell: exact, and a third slower for small models")
    sections: dict[str, dict[str, Any]] = Field({}, description="settings of report sections, by their names")

    @field_validator("judges")
    @classmethod
    def _named(cls, judges: tuple[JudgeSettings, ...]) -> tuple[JudgeSettings, ...]:
        check_names(judges)
        return judges

    @model_validator(mode="after")
    def _trainable(self) -> Self:
        try:
            TeacherConfig.of({"base": "base", **self.teacher_settings})
            for settings in (self.student, self.alignment_stage):
                FinetuneConfig.of({"base": "base", **settings})
        except UsageError as error:
            raise ValueError(str(error)) from None
        for method in (METHODS[name] for block in self.blocks for name in block.methods):
            if fixed := sorted(method.student.keys() & self.student):
                raise ValueError(f"student.{fixed[0]} is part of the method `{method.title}`: choose another method")
        return self
