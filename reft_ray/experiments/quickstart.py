"""The whole method on a laptop: a poisoned dataset breaks a finetuned model, and the Ref-Teacher prevents it.

Nothing is chosen on evaluation rows: thresholds and layer come from the teacher's validation prompts, and the
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
from reft_ray.experiments.chain import Screened, screen_rows, train_cell
from reft_ray.experiments.evaluate import evaluate_student
from reft_ray.experiments.plots import plot_methods, plot_scores
from reft_ray.experiments.report import write_report
from reft_ray.experiments.stages import Show, Stages
from reft_ray.finetuning.config import FinetuneConfig, Resources
from reft_ray.finetuning.teacher_loop import TeacherData
from reft_ray.finetuning.trainer import prepare_teacher
from reft_ray.hf.generate import load_responder
from reft_ray.hf.parallel_passes import compute_pool
from reft_ray.hf.ref_teacher import RefTeacher, load_scorer
from reft_ray.pipeline.builtin import TEACHER_EPOCHS, teacher_settings
from reft_ray.testbed.base_model import Recipe, ensure_base
from reft_ray.testbed.rows import write_chat_rows
from reft_ray.testbed.synthetic import Sizes, SyntheticRows
from reft_ray.testbed.tasks import Task

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Plan:
    """The size of the experiment; the defaults are what `make quickstart` runs."""

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
    """A row of the table: how it is trained, on which rows, and from which weights."""

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

# The longest first, so that it is not left alone at the end. guided comes late: it shares distill's soft labels, which
# two that begin together would both compute.
_ORDER = ("distill", "aligned_sft", "sft_clean", "guided", "filter")

# What each stage once added to the whole, in seconds on two cores: where the estimate of the time left starts from.
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
    """Run every stage, write `report.json`, `report.html` and two plots to `out`; returns the report.

    Ray must be running already.
    """
    plan = plan or Plan()
    out.mkdir(parents=True, exist_ok=True)
    stages = Stages(_USUAL, show)
    world = SyntheticRows.make(plan.seed, plan.sizes)
    with stages.stage("base model") as tell:
        base = ensure_base(cache, 0, lambda done, total: tell({"progress": done / total}), plan.recipe)
    with stages.stage("Ref-Teacher") as tell:
        data = TeacherData(world.teacher_train, world.teacher_validation)
        settings = teacher_settings(base, plan.seed, plan.teacher_epochs)
        teacher = prepare_teacher(settings, data, out / "teacher", Resources(workers=0), progress=tell)
    user = world.user_rows(plan.user_rows, plan.harmful_ratio, plan.task, plan.seed)
    write_chat_rows(out / "user.jsonl", user)
    with stages.stage("screening"):
        screened = screen_rows(out / "user.jsonl", user, teacher, out / "screened", str(base))

    def student_of(name: str) -> dict[str, Any]:
        student = STUDENTS[name]
        with stages.stage(name) as tell:
            config = student_settings(base, student, plan)
            rows = user if student.poisoned else [row for row in user if row.label is Label.HARMLESS]
            cell = train_cell(
                config,
                rows,
                screened,
                world.alignment,
                teacher,
                out / "students" / name,
                Resources(workers=workers),
                tell,
            )
            respond = load_responder(str(base), cell.student)
            figures = evaluate_student(
                respond, world.hs_prompts, world.over_refusal_prompts, world.task_test(plan.task)
            )
        return {**figures, **_rows(rows, screened, student.method), "seconds": round(cell.seconds, 1)}

    found = dict(zip(_ORDER, side_by_side(student_of, _ORDER, students_at_once(workers)), strict=True))
    methods = {name: found[name] for name in STUDENTS}
    report = {
        "seed": plan.seed,
        "seconds_total": 0.0,
        "filter": _filter(teacher, str(base), user, screened, out),
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
    """How many students of so many single-threaded workers this machine trains together.

    A step of a model this small is too short for two threads, and while one student starts up another one learns.
    """
    slots = int(ray.cluster_resources()["CPU"])
    # Ray Data's tasks need slots beside those that training workers hold to their end.
    return max(1, min(len(STUDENTS), os.cpu_count() or 1, slots - 2) // max(1, workers))


def side_by_side(run: Callable[[str], Result], names: Sequence[str], at_once: int) -> list[Result]:
    """Results in order, each from a thread of its own. The first error, or an interrupt, ends all of them."""
    # They evaluate in these threads, beside others that train: each has its share of the processors.
    with compute_pool(at_once, max(1, torch.get_num_threads() // at_once)) as pool:
        try:
            return list(pool.map(run, names))
        except BaseException:
            # Whatever still trains is waited for otherwise.
            ray.shutdown()
            raise


def _rows(rows: Sequence[Example], screened: Screened, method: Method) -> dict[str, int]:
    """Rows by true label, and how many of each the method did not train on."""
    dropped = screened.dropped if method.filters else {Label.HARMFUL: 0, Label.HARMLESS: 0}
    return {
        f"{label}_{what}": count
        for label in Label
        for what, count in (("rows", sum(row.label is label for row in rows)), ("dropped", dropped[label]))
    }


def _filter(teacher: RefTeacher, base: str, user: Sequence[Example], screened: Screened, out: Path) -> dict[str, Any]:
    """The filter on the user's rows: ranking by prompt score, recall and FPR by what was really dropped."""
    scorer = load_scorer(teacher.folder, base)
    scores = [item.score for item in scorer.score([row.prompt[-1].content for row in user])]
    harmful = [score for score, row in zip(scores, user, strict=True) if row.label is Label.HARMFUL]
    harmless = [score for score, row in zip(scores, user, strict=True) if row.label is Label.HARMLESS]
    plot_scores(harmless, harmful, teacher.manifest.thresholds, out / "scores.png")
    labels = torch.tensor([row.label is Label.HARMFUL for row in user]).long()
    quality = filter_quality(torch.tensor(scores), labels, teacher.manifest.thresholds)
    dropped = screened.dropped
    return {
        "auroc": quality.auroc,
        "recall": dropped[Label.HARMFUL] / len(harmful),
        "fpr": dropped[Label.HARMLESS] / len(harmless),
        "threshold": teacher.manifest.thresholds.block,
        "teacher": teacher.id,
        "layer": teacher.manifest.layer,
        "validation": asdict(teacher.manifest.quality),
    }
