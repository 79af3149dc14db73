"""The real steps of a job, one function of this room each; `make` is what a driver's configuration names."""

from __future__ import annotations

from functools import cache
from typing import Any

from reft_ray.jobs.results import Evaluation, Export, Screening, Training, Validation
from reft_ray.jobs.run import JobRun
from reft_ray.pipeline.config import StepsConfig
from reft_ray.pipeline.export import export_student
from reft_ray.pipeline.gate import evaluate_student
from reft_ray.pipeline.model_context import ModelContext
from reft_ray.pipeline.screen import review_decisions, screen_file
from reft_ray.pipeline.settings import refuse_weaker
from reft_ray.pipeline.train import train_student
from reft_ray.pipeline.validate import validate_files


class RealSteps:
    """See `jobs.steps.Steps`."""

    def __init__(self, config: StepsConfig) -> None:
        self.config = config
        self._surroundings = cache(lambda name: ModelContext(config.base(name)))

    def validate(self, run: JobRun) -> Validation:
        """See Steps."""
        context = self._world(run)
        refuse_weaker(run.job.spec, context.args, context.teacher.manifest.thresholds)
        return validate_files(run, context.base, self.config.min_rows, context.args.gate.match)

    def screen(self, run: JobRun, validation: Validation) -> Screening:
        """See Steps."""
        return screen_file(run, self._world(run))

    def review(self, run: JobRun, screening: Screening) -> Screening:
        """See Steps."""
        return review_decisions(run)

    def train(self, run: JobRun, screening: Screening) -> Training:
        """See Steps."""
        return train_student(run, self._world(run), self.config.folder, screening)

    def evaluate(self, run: JobRun, training: Training) -> Evaluation:
        """See Steps."""
        return evaluate_student(run, self._world(run), training, self.config.device)

    def export(self, run: JobRun, screening: Screening, training: Training, evaluation: Evaluation) -> Export:
        """See Steps."""
        return export_student(run, self._world(run), screening, training, evaluation, self.config.archive)

    def _world(self, run: JobRun) -> ModelContext:
        return self._surroundings(run.job.spec.model)


def make(**options: Any) -> RealSteps:
    """The factory that a driver's configuration names: `reft_ray.pipeline.steps:make`."""
    return RealSteps(StepsConfig.of(options))
