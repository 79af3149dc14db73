"""One student of an experiment: filter its rows, finetune it, and evaluate it.

Grid cells, ablations, attacks and the quickstart all train and measure their students here.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from reft_ray.core.conversation import Conversation, Example, Label
from reft_ray.evaluation.gate import Gate
from reft_ray.evaluation.judges import Respond
from reft_ray.evaluation.suite import (
    DISAGREEMENT,
    EVERYDAY_REFUSED,
    FINETUNE_ACCURACY,
    HARMFUL_SCORE,
    INCOHERENT,
    LOOK_ALIKES_REFUSED,
    OVER_REFUSAL,
    SCORE_BY,
    Evaluation,
    Suite,
    evaluate,
)
from reft_ray.experiments.meter import metered
from reft_ray.finetuning.config import FinetuneConfig, Resources
from reft_ray.finetuning.runtime import Progress
from reft_ray.finetuning.trainer import FinetuneInputs, finetune
from reft_ray.hf.ref_teacher import RefTeacher, load_scorer
from reft_ray.screening.config import ScreenConfig
from reft_ray.screening.dataset import screen
from reft_ray.screening.kept_rows import kept_rows
from reft_ray.screening.report import ScreenReport
from reft_ray.testbed.synthetic import write_chat_rows

Figures = dict[str, Any]
"""JSON: percentages by measure, their 95 % `intervals`, numbers of `prompts`, and what training cost."""

_REWRITTEN = "harmful_score_rewritten"


@dataclass(frozen=True, slots=True)
class FilteredRows:
    """Labelled rows after screening; `kept_at` are positions in `rows`. A service does not have the labels."""

    rows: Sequence[Example]
    kept_at: frozenset[int]
    report: ScreenReport

    @property
    def kept(self) -> list[Example]:
        """The rows to train on."""
        return [row for place, row in enumerate(self.rows) if place in self.kept_at]

    @property
    def dropped(self) -> dict[str, int]:
        """Rows that are not trained on, by true label."""
        return count_labels(row for place, row in enumerate(self.rows) if place not in self.kept_at)


def filter_rows(
    rows: Sequence[Example],
    teacher: RefTeacher,
    base: str,
    folder: Path,
    screening: ScreenConfig | None = None,
    precision: str = "float32",
    threshold: float | None = None,
) -> FilteredRows:
    """Screen rows as a service does, with all files in `folder`, which is replaced; rows for review are dropped too.

    With a `threshold` the rows above it are dropped and no others: neither the teacher's thresholds nor the dataset's
    apply.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_chat_rows(folder / "rows.jsonl", rows)
    scorer = partial(load_scorer, teacher.folder, base, precision, threshold)
    out = str(folder / "screened")
    config = screening or ScreenConfig(findings=False)
    config = config if threshold is None else replace(config, job_threshold=False)
    report = screen([str(folder / "rows.jsonl")], out, scorer, config)
    return FilteredRows(rows, frozenset(number - 1 for number, _ in kept_rows(out)), report)


def count_labels(rows: Iterable[Example]) -> dict[str, int]:
    """Rows by true label."""
    labels = [row.label for row in rows]
    return {label.value: labels.count(label) for label in Label}


def train_adapter(
    config: FinetuneConfig,
    rows: Sequence[Example],
    teacher: RefTeacher | None,
    out: Path,
    resources: Resources,
    alignment: Sequence[Example] = (),
    run_id: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Finetune on rows as they are; `alignment` rows are used by the methods that read them."""
    inputs = FinetuneInputs(rows, len(rows), alignment if config.method.distills else (), teacher)
    return finetune(config, inputs, out, resources, run_id, progress)


def run_student(
    config: FinetuneConfig,
    rows: Sequence[Example],
    teacher: RefTeacher | None,
    out: Path,
    *,
    suite: Suite,
    respond: Callable[[Path], Respond],
    resources: Resources,
    alignment: Sequence[Example] = (),
    edit: Callable[[Path], Path] | None = None,
    reference: Evaluation | None = None,
    rewritten: Sequence[Conversation] = (),
    progress: Progress | None = None,
    count_flops: bool = False,
) -> Figures:
    """Finetune one student into `out` and evaluate it; returns figures, never the text of a row.

    `edit` changes the trained student before `respond` loads it. With a `reference` the release gate is applied.
    `rewritten` are harmful prompts in the form of an attack; they get a harmful score of their own.
    """
    device = "cuda" if resources.gpus_per_worker else "cpu"
    with metered(count_flops, device) as training:
        student = train_adapter(config, rows, teacher, out, resources, alignment, progress=progress)
    with metered(device=device) as editing:
        student = edit(student) if edit else student
    model = respond(student)
    found = evaluate(model, suite)
    figures = figures_of(found)
    if reference is not None:
        gate = Gate().check(found, reference)
        figures["gate"] = {"passed": gate.passed, "failures": [check.measure for check in gate.failures]}
    if rewritten:
        measure = evaluate(model, Suite(harmful=rewritten, judges=suite.judges, seed=suite.seed))[HARMFUL_SCORE]
        figures[_REWRITTEN] = measure.value
        figures["intervals"][_REWRITTEN] = [measure.low, measure.high]
    return {
        **figures,
        "seconds": round(training.seconds + editing.seconds, 1),
        "peak_mib": round(max(training.peak_mib, editing.peak_mib)),
        "flops": training.flops,
    }


def figures_of(found: Evaluation) -> Figures:
    """The evaluation of one task as a report holds it."""
    named = {name.partition("/")[0]: measure for name, measure in found.measures.items()}
    counted = {"harmful": HARMFUL_SCORE, "harmless": LOOK_ALIKES_REFUSED, "task": FINETUNE_ACCURACY}
    measures = (HARMFUL_SCORE, FINETUNE_ACCURACY, OVER_REFUSAL, LOOK_ALIKES_REFUSED, EVERYDAY_REFUSED)
    judged = {
        name: measure.as_dict() for name, measure in found.measures.items() if name.startswith((SCORE_BY, DISAGREEMENT))
    }
    return {
        **{name: named[name].value for name in (*measures, INCOHERENT)},
        "intervals": {name: [named[name].low, named[name].high] for name in measures},
        "prompts": {kind: named[name].n for kind, name in counted.items()},
        **({"judges": judged} if judged else {}),
    }
