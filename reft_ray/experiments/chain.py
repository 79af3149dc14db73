"""One method on one dataset, end to end: screen with Ray Data, finetune with Ray Train, evaluate the student."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from reft_ray.core.conversation import Example, Label
from reft_ray.finetuning.config import FinetuneConfig, Resources
from reft_ray.finetuning.data import dataset_of
from reft_ray.finetuning.runtime import Progress
from reft_ray.finetuning.trainer import FinetuneInputs, finetune
from reft_ray.hf.ref_teacher import RefTeacher, load_scorer
from reft_ray.screening.config import ScreenConfig
from reft_ray.screening.dataset import screen
from reft_ray.screening.kept import kept_count, kept_dataset, kept_rows


@dataclass(frozen=True, slots=True)
class Screened:
    """A user dataset behind the filter. `labels` is the truth by row number; a real service does not have it."""

    folder: str
    labels: dict[int, Label | None]

    @property
    def dropped(self) -> dict[Label, int]:
        """Rows that are not trained on, by their true label."""
        kept = {number for number, _ in kept_rows(self.folder)}
        out = {Label.HARMFUL: 0, Label.HARMLESS: 0}
        for number, label in self.labels.items():
            if label is not None and number not in kept:
                out[label] += 1
        return out


def screen_rows(rows: Path, truth: Sequence[Example], teacher: RefTeacher, out: Path, base: str) -> Screened:
    """Screen a JSONL file of user rows through a Ray Data actor pool; drop what lies above the block threshold.

    Nobody reviews here, so the review band is kept: tau of the method is the block threshold.
    """
    block = teacher.manifest.thresholds.block
    factory = partial(load_scorer, teacher.folder, base, "float32", block)
    shutil.rmtree(out, ignore_errors=True)  # an earlier run's output belongs to another teacher
    screen([str(rows)], str(out), factory, ScreenConfig(small_rows=0, findings=False))
    return Screened(str(out), {number: row.label for number, row in enumerate(truth, start=1)})


@dataclass(frozen=True, slots=True)
class Cell:
    """A trained student, the rows that it saw, and how long that took."""

    student: Path
    rows: int
    seconds: float


def train_cell(
    config: FinetuneConfig,
    rows: Sequence[Example],
    screened: Screened | None,
    alignment: Sequence[Example],
    teacher: RefTeacher,
    out: Path,
    resources: Resources,
    progress: Progress | None = None,
) -> Cell:
    """Finetune one student on the kept rows (methods that filter) or on all of them."""
    started = time.perf_counter()
    if config.method.filters and screened is not None:
        data, count = kept_dataset(screened.folder), kept_count(screened.folder)
    else:
        data, count = dataset_of(rows), len(rows)
    needs_alignment = alignment if config.method.distills else ()
    inputs = FinetuneInputs(data, count, needs_alignment, teacher)
    student = finetune(config, inputs, out, resources, progress=progress)
    return Cell(student, count, time.perf_counter() - started)
