"""The real steps of a job, one function of this room each; `make` is what a driver's configuration names."""

from __future__ import annotations

from functools import cache
from typing import Any

from reft_ray.jobs.run import JobRun
from reft_ray.jobs.steps import Evaluation, Export, Screening, Training, Validation
from reft_ray.service.config import StepsConfig
from reft_ray.service.export import export_student
from reft_ray.service.gate import evaluate_student
from reft_ray.service.screen import review_decisions, screen_file
from reft_ray.service.settings import refuse_weaker
from reft_ray.service.surroundings import Surroundings
from reft_ray.service.train import train_student
from reft_ray.service.validate import validate_files


class RealSteps:
    """See `jobs.steps.Steps`."""

    def __init__(self, config: StepsConfig) -> None:
        self.config = config
        self._surroundings = cache(lambda name: Surroundings(config.base(name)))

    def validate(self, run: JobRun) -> Validation:
        """See Steps."""
        world = self._world(run)
        refuse_weaker(run.job.spec, world.args, world.teacher.manifest.thresholds)
        return validate_files(run, world.base, self.config.min_rows, world.args.gate.match)

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

    def _world(self, run: JobRun) -> Surroundings:
        return self._surroundings(run.job.spec.model)


def make(**options: Any) -> RealSteps:
    """The factory that a driver's configuration names: `reft_ray.service.steps:make`."""
    return RealSteps(StepsConfig.of(options))
