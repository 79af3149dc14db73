"""What a service does with a user's files, as one run: read and screen them, then finetune on what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from reft_ray.core.conversation import Example
from reft_ray.core.errors import UsageError
from reft_ray.experiments.chain import scorer_of
from reft_ray.experiments.passing import PassingScorer
from reft_ray.finetuning.config import FinetuneConfig, Resources
from reft_ray.finetuning.runtime import Progress
from reft_ray.finetuning.trainer import FinetuneInputs, finetune
from reft_ray.hf.ref_teacher import RefTeacher
from reft_ray.screening.config import ScorerFactory, ScreenConfig
from reft_ray.screening.dataset import Progress as ScreenProgress
from reft_ray.screening.dataset import screen
from reft_ray.screening.kept import kept_count, kept_dataset


@dataclass
class ServiceRun:
    """One user's finetuning. Every row passes the reader's validation, also under methods that do not filter."""

    config: FinetuneConfig
    resources: Resources
    out: Path
    teacher_folder: Path | None
    alignment: Sequence[Example] = ()
    max_reject_ratio: float | None = None
    teacher: RefTeacher | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.teacher_folder is not None:
            self.teacher = RefTeacher.load(self.teacher_folder)
        elif self.config.method.filters:
            raise UsageError(f"method {self.config.method} filters: name a --teacher")
        if self.config.method.distills and not self.alignment:
            raise UsageError(f"method {self.config.method} distils: name --alignment, or --refusals and --helpful")

    @property
    def screening_folder(self) -> Path:
        """Where the screening's output stays, evidence included."""
        return self.out.with_name(self.out.name + ".screening")

    def screen(self, data: Sequence[str], progress: Progress | None = None) -> dict[str, int]:
        """Screen the files; counts of rows in, kept, withheld and invalid. Raises BlockedByPolicyError."""
        factory: ScorerFactory
        if self.config.method.filters and self.teacher is not None:
            factory = partial(scorer_of, self.teacher.folder, self.config.base, "auto", self.config.threshold)
        else:
            factory = PassingScorer

        def tell(state: ScreenProgress) -> None:
            if progress:
                progress({"progress": state.done / max(1, state.total)})

        report = screen(
            data, str(self.screening_folder), factory, ScreenConfig(max_reject_ratio=self.max_reject_ratio), tell
        )
        return {
            "rows": report.rows,
            "kept": report.kept,
            "review": report.review,
            "blocked": report.blocked,
            "invalid": report.invalid,
        }

    def train(self, run_id: str | None = None, progress: Progress | None = None) -> Path:
        """Finetune on the kept rows."""
        folder = str(self.screening_folder)
        inputs = FinetuneInputs(kept_dataset(folder), kept_count(folder), self.alignment, self.teacher)
        return finetune(self.config, inputs, self.out, self.resources, run_id, progress)
