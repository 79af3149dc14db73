"""What a job does, as a Protocol: the pipeline knows the order and the rules, the steps know the machines.

Each step gives back a small record of numbers and ids, which is written down: a step that is recorded is never
run again. A step that was interrupted is run again, so it must be safe to repeat: it writes under the run's own
directory, stores files under `run.save_file` names and continues from the checkpoints that it reported.
"""

from __future__ import annotations

from typing import Protocol

from reft_ray.jobs.results import Evaluation, Export, Screening, Training, Validation
from reft_ray.jobs.run import JobRun


class Steps(Protocol):
    """The work of a job. All methods may run again after a crash; see the module's docstring.

    They raise StoppedError when `run.should_stop()` says so, JobFailedError for what the user can mend, and
    anything else for trouble of ours: the job is then started again, from its last checkpoint.
    """

    def validate(self, run: JobRun) -> Validation:
        """Read all rows of the files and check them."""
        ...

    def screen(self, run: JobRun, validation: Validation) -> Screening:
        """Judge all rows; write the kept ones, the quarantine and the report."""
        ...

    def review(self, run: JobRun, screening: Screening) -> Screening:
        """After people have decided: the screening with the approved rows among the kept ones."""
        ...

    def train(self, run: JobRun, screening: Screening) -> Training:
        """Guided finetuning on the kept rows, reporting metrics and checkpoints; goes on from the last checkpoint."""
        ...

    def evaluate(self, run: JobRun, training: Training) -> Evaluation:
        """Measure the student and the model before finetuning."""
        ...

    def export(self, run: JobRun, screening: Screening, training: Training, evaluation: Evaluation) -> Export:
        """Pack the student."""
        ...
