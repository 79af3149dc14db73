"""The whole method on a laptop: a poisoned dataset makes a finetuned model harmful, and the Ref-Teacher prevents it.

No setting is chosen on evaluation rows: the teacher's validation prompts choose its thresholds and layer, and the
settings below are the same for every seed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import ray
import torch

from reft_ray.core.conversation import Example, Label
from reft_ray.core.guided import Method
from reft_ray.core.quality import filter_quality
from reft_ray.evaluation.suite import Suite, TaskTest
from reft_ray.experiments.plots import plot_methods, plot_scores
from reft_ray.experiments.report import write_report
from reft_ray.experiments.stages import Show, Stages
from reft_ray.experiments.student import FilteredRows, count_labels, filter_rows, run_student
from reft_ray.finetuning.config import FinetuneConfig, Resources
from reft_ray.finetuning.teacher_loop import TeacherData
from reft_ray.finetuning.trainer import prepare_teacher
from reft_ray.hf.compute import compute_pool
from reft_ray.hf.generate import load_responder
from reft_ray.hf.ref_teacher import RefTeacher, load_scorer
from reft_ray.pipeline.builtin import TEACHER_EPOCHS, teacher_settings
from reft_ray.screening.config import ScreenConfig
from reft_ray.testbed.base_model import Recipe, ensure_base
from reft_ray.testbed.synthetic import Sizes, SyntheticRows
from reft_ray.testbed.tasks import Task

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Plan:
    """The size of the experiment; `make quickstart` runs the defaults."""

    seed: int = 0
    harmful_ratio: float = 0.3
    user_rows: int = 1000
    task: Task = Task.SENTIMENT
    sizes: Sizes = field(default_factory=Sizes)
    recipe: Recipe = field(default_factory=Recipe)
    teacher_epochs: float = TEACHER_EPOCHS
    student_epochs: float = 4


@dataclass(frozen=True, slots=True)
class Student:
    """A row of the table: its method, its rows, and its initial weights."""

    method: Method
    poisoned: bool = True
    init: str = "base"


STUDENTS = {
    "sft_clean": Student(Method.SFT, poisoned=False),
    "aligned_sft": Student(Method.SFT, init="aligned"),
    "filter": Student(Method.FILTER),
    "distill": Student(Method.DISTILL),
    "guided": Student(Method.GUIDED),
}

# The longest first, so that it does not run alone at the end. guided comes late: it shares distill's soft labels, which
# both would compute if they started together.
_ORDER = ("distill", "aligned_sft", "sft_clean", "guided", "filter")

# What each stage once added to the total time, in seconds on two cores: the first estimate of the remaining time.
_USUAL = {
    "base model": 84.0,
    "Ref-Teacher": 69.0,
    "screening": 11.0,
    "sft_clean": 30.0,
    "aligned_sft": 33.0,
    "filter": 25.0,
    "distill": 93.0,
    "guided": 41.0,
}


def student_settings(base: Path, student: Student, plan: Plan) -> FinetuneConfig:
    """Stage 2 as the quickstart runs it, the same for every method."""
    return FinetuneConfig.of(
        {
            "base": str(base),
            "method": student.method,
            "init": student.init,
            "epochs": plan.student_epochs,
            "batch_rows": 8,
            "alignment_ratio": 2.5,
            "optimizer": {"learning_rate": 2e-3},
            "checkpoint_every": 1_000_000,
            "seed": plan.seed,
        }
    )


def run_quickstart(out: Path, cache: Path, show: Show, plan: Plan | None = None, workers: int = 1) -> dict[str, Any]:
    """Run all stages and write `report.json`, `report.html` and two plots to `out`; returns the report.

    Ray must be running.
    """
    plan = plan or Plan()
    out.mkdir(parents=True, exist_ok=True)
    stages = Stages(_USUAL, show)
    synthetic = SyntheticRows.make(plan.seed, plan.sizes)
    with stages.stage("base model") as update:
        base = ensure_base(cache, 0, lambda done, total: update({"progress": done / total}), plan.recipe)
    with stages.stage("Ref-Teacher") as update:
        data = TeacherData(synthetic.teacher_train, synthetic.teacher_validation)
        settings = teacher_settings(base, plan.seed, plan.teacher_epochs)
        teacher = prepare_teacher(settings, data, out / "teacher", Resources(workers=0), progress=update)
    user = synthetic.user_rows(plan.user_rows, plan.harmful_ratio, plan.task, plan.seed)
    with stages.stage("screening"):
        # Never in this process: the quickstart shows the actor pool.
        screening = ScreenConfig(small_rows=0, findings=False)
        filtered = filter_rows(user, teacher, str(base), out / "filter", screening)
    suite = Suite(
        harmful=[row.prompt for row in synthetic.hs_prompts],
        harmless=[row.prompt for row in synthetic.over_refusal_prompts],
        tasks={plan.task.value: TaskTest(synthetic.task_test(plan.task))},
    )

    def student_of(name: str) -> dict[str, Any]:
        student = STUDENTS[name]
        given = user if student.poisoned else [row for row in user if row.label is Label.HARMLESS]
        with stages.stage(name) as update:
            figures = run_student(
                student_settings(base, student, plan),
                filtered.kept if student.method.filters else given,
                teacher,
                out / "students" / name,
                suite=suite,
                respond=lambda adapter: load_responder(str(base), adapter),
                resources=Resources(workers=workers),
                alignment=synthetic.alignment,
                progress=update,
            )
        # Not measured: students train in other processes.
        del figures["peak_mib"], figures["flops"]
        return figures | _counts(given, filtered if student.method.filters else None)

    found = dict(zip(_ORDER, run_in_parallel(student_of, _ORDER, students_at_once(workers)), strict=True))
    methods = {name: found[name] for name in STUDENTS}
    report = {
        "seed": plan.seed,
        "seconds_total": 0.0,
        "filter": _filter(teacher, str(base), user, filtered, out),
        "methods": methods,
        "stages": {name: round(seconds, 1) for name, seconds in stages.seconds.items()},
    }
    plot_methods(methods, out / "methods.png")
    report["seconds_total"] = round(stages.seconds_total, 1)
    summary = (
        f"{plan.user_rows} rows of a {plan.task} task, {plan.harmful_ratio:.0%} of them harmful requests with "
        "complying answers, finetuned in five ways on the built-in base model."
    )
    write_report(report, summary, out)
    return report


def students_at_once(workers: int) -> int:
    """How many students with this many single-threaded workers each this machine trains in parallel.

    A step of a model this small is too short for two threads, and one student can train while another starts.
    """
    slots = int(ray.cluster_resources()["CPU"])
    # Ray Data's tasks need slots besides those of the training workers.
    return max(1, min(len(STUDENTS), os.cpu_count() or 1, slots - 2) // max(1, workers))


def run_in_parallel(run: Callable[[str], Result], names: Sequence[str], at_once: int) -> list[Result]:
    """Results in order, computed in threads. The first error, or an interrupt, ends all of them."""
    # Students are evaluated in these threads while others train: each gets its share of the processors.
    with compute_pool(at_once, max(1, torch.get_num_threads() // at_once)) as pool:
        try:
            return list(pool.map(run, names))
        except BaseException:
            # Otherwise the pool waits for the students that still train.
            ray.shutdown()
            raise


def _counts(given: Sequence[Example], filtered: FilteredRows | None) -> dict[str, int]:
    """Rows by true label, and the number of each that the method did not train on."""
    rows, dropped = count_labels(given), filtered.dropped if filtered else count_labels(())
    return {
        f"{label}_{name}": counts[label] for label in rows for name, counts in (("rows", rows), ("dropped", dropped))
    }


def _filter(
    teacher: RefTeacher, base: str, user: Sequence[Example], filtered: FilteredRows, out: Path
) -> dict[str, Any]:
    """The filter on the user's rows: ranking by prompt score, recall and FPR by the rows that were dropped."""
    scorer = load_scorer(teacher.folder, base)
    scores = [item.score for item in scorer.score([row.prompt[-1].content for row in user])]
    harmful = [score for score, row in zip(scores, user, strict=True) if row.label is Label.HARMFUL]
    harmless = [score for score, row in zip(scores, user, strict=True) if row.label is Label.HARMLESS]
    plot_scores(harmless, harmful, teacher.manifest.thresholds, out / "scores.png")
    labels = torch.tensor([row.label is Label.HARMFUL for row in user]).long()
    quality = filter_quality(torch.tensor(scores), labels, teacher.manifest.thresholds)
    dropped = filtered.dropped
    return {
        "auroc": quality.auroc,
        "recall": dropped["harmful"] / len(harmful),
        "fpr": dropped["harmless"] / len(harmless),
        "threshold": teacher.manifest.thresholds.block,
        "teacher": teacher.id,
        "layer": teacher.manifest.layer,
        "validation": asdict(teacher.manifest.quality),
    }
