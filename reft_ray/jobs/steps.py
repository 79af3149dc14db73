"""The work of a job as a Protocol: `lifecycle` has the order and the rules, an implementation has the models.

Each step returns a small record of numbers and ids, which is stored: a recorded step is never repeated. An interrupted
step is repeated, so it must be idempotent: it writes below the run's own URIs, stores files with `run.save_file` and
resumes from the checkpoints that it reported.
"""

from __future__ import annotations

from typing import Protocol

from reft_ray.jobs.results import Evaluation, Export, Screening, Training, Validation
from reft_ray.jobs.run import JobRun


class Steps(Protocol):
    """The work of a job. All methods may run again after a crash; see the module's docstring.

    They raise StoppedError when `run.should_stop()`, and JobFailedError for what the user can fix. After any other
    error the job is started again, from its last checkpoint.
    """

    def validate(self, run: JobRun) -> Validation:
        """Check all rows of the files."""
        ...

    def screen(self, run: JobRun, validation: Validation) -> Screening:
        """Judge all rows; write the kept rows, the quarantine and the report; file withheld rows for review."""
        ...

    def review(self, run: JobRun, screening: Screening) -> Screening:
        """Add the rows that people approved (`run.decisions()`) to the kept ones."""
        ...

    def train(self, run: JobRun, screening: Screening) -> Training:
        """Finetune on the kept rows from the last checkpoint, reporting metrics and checkpoints."""
        ...

    def evaluate(self, run: JobRun, training: Training) -> Evaluation:
        """Evaluate the student and the base model."""
        ...

    def export(self, run: JobRun, screening: Screening, training: Training, evaluation: Evaluation) -> Export:
        """Package the student."""
        ...
