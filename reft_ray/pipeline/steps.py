"""The steps of a job (`jobs.steps.Steps`). `make` is the factory that drivers load."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from reft_ray.hf.model_store import cache_root
from reft_ray.jobs.errors import NotFoundError
from reft_ray.jobs.results import Evaluation, Export, Screening, Training, Validation
from reft_ray.jobs.run import JobRun
from reft_ray.pipeline.base_figures import BaseFigures
from reft_ray.pipeline.builtin import local_base
from reft_ray.pipeline.config import BaseArgs
from reft_ray.pipeline.evaluate import evaluate_student
from reft_ray.pipeline.export import export_student
from reft_ray.pipeline.model_context import ModelContext
from reft_ray.pipeline.run_config import check_may_teach, check_not_weaker, finetune_config
from reft_ray.pipeline.screen import review_decisions, screen_file
from reft_ray.pipeline.train import train_student
from reft_ray.pipeline.validate import validate_files
from reft_ray.settings import Settings
from reft_ray.teachers import BUILTIN


class StepsConfig(Settings):
    """Options of `make`. `shared` is a directory that all machines reach; it keeps soft labels between jobs (default:
    the user's cache directory)."""

    bases: Mapping[str, BaseArgs] = Field(default_factory=lambda: {BUILTIN: local_base()}, min_length=1)
    shared: str | None = None
    min_rows: int = Field(10, ge=1)
    archive: bool = Field(True, description="also save the adapter as a result file, a zip")
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def base(self, name: str) -> BaseArgs:
        """A base model's configuration. Raises NotFoundError if the operator has removed it."""
        if name not in self.bases:
            raise NotFoundError("base model", name)
        return self.bases[name]

    @property
    def folder(self) -> Path:
        """`shared`, or its default."""
        return Path(self.shared) if self.shared else cache_root() / "jobs"


class PipelineSteps:
    """Screening, training, evaluation and export on the configured base models."""

    def __init__(self, config: StepsConfig) -> None:
        self.config = config
        self._contexts = cache(lambda name: ModelContext(config.base(name)))

    def validate(self, run: JobRun) -> Validation:
        context = self._context(run)
        check_not_weaker(run.job.spec, context.args, context.teacher.manifest.thresholds)
        check_may_teach(run, finetune_config(run.job.spec, context.args, context.base), context.teacher)
        return validate_files(run, context.base, self.config.min_rows, context.args.gate.match)

    def screen(self, run: JobRun, validation: Validation) -> Screening:
        return screen_file(run, self._context(run))

    def review(self, run: JobRun, screening: Screening) -> Screening:
        return review_decisions(run, self._context(run))

    def train(self, run: JobRun, screening: Screening) -> Training:
        return train_student(run, self._context(run), self.config.folder, screening)

    def evaluate(self, run: JobRun, training: Training) -> Evaluation:
        return evaluate_student(
            run, self._context(run), training, self.config.device, BaseFigures(self.config.folder / "base_figures")
        )

    def export(self, run: JobRun, screening: Screening, training: Training, evaluation: Evaluation) -> Export:
        return export_student(run, self._context(run), screening, training, evaluation, self.config.archive)

    def _context(self, run: JobRun) -> ModelContext:
        return self._contexts(run.job.spec.model)


def make(**options: Any) -> PipelineSteps:
    """The steps for these options. Raises UsageError for invalid ones."""
    return PipelineSteps(StepsConfig.of(options))
