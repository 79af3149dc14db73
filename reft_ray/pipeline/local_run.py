"""Screen a user's files and finetune on the kept rows, without the service: `reft-ray finetune`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from reft_ray.core.conversation import Example
from reft_ray.core.errors import UsageError
from reft_ray.core.job_threshold import FLOOR
from reft_ray.core.scoring import TextScore
from reft_ray.core.verdict import Calibration, Thresholds
from reft_ray.finetuning.config import FinetuneConfig, Resources
from reft_ray.finetuning.prompts import read_labelled
from reft_ray.finetuning.runtime import Phase, Progress, no_phase
from reft_ray.finetuning.teacher_gate import check_teacher
from reft_ray.finetuning.trainer import FinetuneInputs, finetune
from reft_ray.hf.control_tokens import special_tokens
from reft_ray.hf.loading import load_tokenizer
from reft_ray.hf.ref_teacher import RefTeacher, load_scorer
from reft_ray.hf.teacher_card import alignment_file
from reft_ray.screening.config import ScorerFactory, ScreenConfig
from reft_ray.screening.dataset import Progress as ScreenProgress
from reft_ray.screening.dataset import screen
from reft_ray.screening.kept_rows import kept_count, kept_dataset, kept_hash, kept_rows
from reft_ray.screening.metrics import ScreeningMetrics
from reft_ray.telemetry.recorder import NullRecorder, Recorder

if TYPE_CHECKING:
    from ray.data import Dataset


class PassingScorer:
    """The scorer of methods without a filter: every text passes; rows are still validated and counted."""

    teacher_id = "none"
    thresholds = Thresholds(1.0, 1.0)
    calibration = Calibration(0.0, -30.0)
    response_offset = 0.0

    def score(self, texts: Sequence[str]) -> list[TextScore]:
        """The lowest score for each text."""
        return [TextScore(-1.0) for _ in texts]


@dataclass
class LocalRun:
    """One user's finetuning. Rows are validated under every method, also under those that do not filter.

    `job_threshold` and `job_threshold_floor` are those of ScreenConfig. Where `config.threshold` is set, it alone
    decides. Without `alignment` rows those that come with the teacher are used, if it has any.
    """

    config: FinetuneConfig
    resources: Resources
    out: Path
    teacher_folder: Path | None
    alignment: Sequence[Example] = ()
    max_reject_ratio: float | None = None
    job_threshold: bool = True
    job_threshold_floor: float = FLOOR
    validation: Sequence[Example] = ()
    teacher: RefTeacher | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.teacher_folder is not None:
            self.teacher = RefTeacher.load(self.teacher_folder)
            if not self.alignment and (own := alignment_file(self.teacher.folder)):
                self.alignment = read_labelled(own)
        elif self.config.method.filters:
            raise UsageError(f"method {self.config.method} filters: name a --teacher")
        if self.config.method.distills and not self.alignment:
            raise UsageError(f"method {self.config.method} distils: name --alignment, or --refusals and --helpful")
        # Before the rows are screened; the run warns.
        check_teacher(self.config, self.teacher)

    @property
    def screening_folder(self) -> Path:
        """The screening's output; it is kept, with the evidence."""
        return self.out.with_name(self.out.name + ".screening")

    def screen(
        self, data: Sequence[str], progress: Progress | None = None, recorder: Recorder | None = None
    ) -> dict[str, int]:
        """Screen the files; counts of rows in, kept, withheld and invalid. Raises BlockedByPolicyError."""
        factory: ScorerFactory
        if self.config.method.filters and self.teacher is not None:
            factory = partial(load_scorer, self.teacher.folder, self.config.base, "auto", self.config.threshold)
        else:
            factory = PassingScorer
        config = ScreenConfig(
            control_tokens=special_tokens(load_tokenizer(self.config.base)),
            max_reject_ratio=self.max_reject_ratio,
            job_threshold=self.job_threshold and factory is not PassingScorer and self.config.threshold is None,
            job_threshold_floor=self.job_threshold_floor,
        )

        def report_progress(state: ScreenProgress) -> None:
            if progress and not state.writing:
                progress({"progress": state.done / max(1, state.total)})

        report = screen(
            data,
            str(self.screening_folder),
            factory,
            config,
            report_progress,
            ScreeningMetrics(recorder or NullRecorder()),
        )
        return {
            "rows": report.rows,
            "kept": report.kept,
            "review": report.review,
            "blocked": report.blocked,
            "invalid": report.invalid,
        }

    def train(
        self,
        run_id: str | None = None,
        progress: Progress | None = None,
        recorder: Recorder | None = None,
        phase: Phase = no_phase,
    ) -> Path:
        """Finetune on the kept rows."""
        inputs = self.inputs(self.resources)
        return finetune(self.config, inputs, self.out, self.resources, run_id, progress, recorder, phase=phase)

    def inputs(self, resources: Resources) -> FinetuneInputs:
        """What a run reads after the screening."""
        folder = str(self.screening_folder)
        return kept_inputs(folder, kept_hash(folder), resources, self.alignment, self.teacher, self.validation)


def kept_inputs(
    screening: str,
    kept_sha256: str,
    resources: Resources,
    alignment: Sequence[Example],
    teacher: RefTeacher | None,
    validation: Sequence[Example] = (),
) -> FinetuneInputs:
    """The inputs of finetuning on the kept rows of a finished screening; without workers the rows are read into memory.

    `kept_sha256` is the screening's `kept_hash`: a run resumes only with the same rows.
    """
    rows: Dataset | list[Example]
    if resources.workers:
        rows = kept_dataset(screening)
    else:
        rows = [Example(turns, place=f"row {number}") for number, turns in kept_rows(screening)]
    return FinetuneInputs(rows, kept_count(screening), alignment, teacher, validation, kept_sha256)
