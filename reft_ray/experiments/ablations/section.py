"""Ablations as a section of the report: one setting at a time, one small training per row.

The trainings are short: figures are comparable within a table only.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field, field_validator

from reft_ray.core.conversation import Example
from reft_ray.core.geometry import Geometry
from reft_ray.core.quality import auprc, auroc, recall_at_fpr
from reft_ray.evaluation.ranking import AurocBootstrap
from reft_ray.experiments.ablations.axes import Variation, student_axes, teacher_axes
from reft_ray.experiments.ablations.tables import render
from reft_ray.experiments.bench.section import Section
from reft_ray.experiments.bench.shared_models import teacher_settings, teacher_variant
from reft_ray.experiments.bench.students import Students
from reft_ray.experiments.bench.workspace import Workspace, content_key
from reft_ray.experiments.filters.rows import labels_of, texts_of
from reft_ray.experiments.filters.section import rows_of
from reft_ray.finetuning.config import FinetuneConfig, TeacherConfig
from reft_ray.finetuning.teacher_loop import TeacherData
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.features import fit_readouts, prompt_features
from reft_ray.hf.features import labels_of as encoded_labels
from reft_ray.hf.loading import load_base
from reft_ray.hf.ref_teacher import RefTeacher, load_scorer
from reft_ray.settings import Settings, all_known

_TAU = "tau"


class AblationSettings(Settings):
    """Sizes: `teacher_rows` rows of a short teacher training, `foreign_rows` that measure it, and the students' rows.

    `teacher` and `student` are configuration keys of all short trainings.
    """

    teacher_rows: int = Field(3200, ge=8)
    foreign_rows: int = Field(2000, ge=8)
    teacher: dict[str, Any] = Field(default_factory=dict)
    task: str | None = None
    rows: int = Field(400, ge=2)
    harmful_ratio: float = Field(0.3, gt=0, lt=1)
    evaluated: int = Field(150, ge=1)
    student: dict[str, Any] = Field(default_factory=dict)
    only: tuple[str, ...] = Field((), description="axes to run; empty: all")
    seed: int = Field(0, ge=0)

    @field_validator("only")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        axes = dict.fromkeys(variation.axis for variation in (*teacher_axes(1), *student_axes()))
        return all_known("axis", names, [*axes, _TAU])


@dataclass(frozen=True, slots=True)
class Cell:
    """One training with its figures, cached by everything that it depends on."""

    table: str
    axis: str
    value: str
    default: bool
    key: Mapping[str, Any]
    make: Callable[[], dict[str, Any]]

    @property
    def name(self) -> str:
        """The cached file's name; two axes share the file of equal trainings."""
        return self.table

    def row(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        """The table's row."""
        return {"axis": self.axis, "value": self.value, "default": self.default, **figures}


def run(workspace: Workspace, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Make every missing row."""
    chosen = AblationSettings.of(settings)
    return _result(
        chosen,
        [(cell, workspace.cached("ablations", cell.name, cell.key, cell.make)) for cell in _cells(workspace, chosen)],
    )


def gather(workspace: Workspace, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The cached rows; empty if there are none."""
    chosen = AblationSettings.of(settings)
    known = [(cell, workspace.stored("ablations", cell.name, cell.key)) for cell in _cells(workspace, chosen)]
    found = [(cell, figures) for cell, figures in known if figures is not None]
    return _result(chosen, found) if found else {}


def _result(chosen: AblationSettings, found: Sequence[tuple[Cell, Mapping[str, Any]]]) -> dict[str, Any]:
    tables: dict[str, list[dict[str, Any]]] = {}
    for cell, figures in found:
        tables.setdefault(cell.table, []).append(cell.row(figures))
    return {"tables": tables, "settings": chosen.model_dump(mode="json")}


def _cells(workspace: Workspace, chosen: AblationSettings) -> Iterator[Cell]:
    for cell in (*_teachers(workspace, chosen), *_students(workspace, chosen), *_thresholds(workspace, chosen)):
        if not chosen.only or cell.axis in chosen.only:
            yield cell


def _teachers(workspace: Workspace, chosen: AblationSettings) -> Iterator[Cell]:
    """Short teacher trainings, measured on foreign rows."""
    rows = rows_of(workspace)
    train = thinned(rows.train, chosen.teacher_rows)
    data = TeacherData(train, rows.validation)
    foreign = thinned(rows.foreign, chosen.foreign_rows)
    # No early stop by validation prompts; the axes vary how features are trained.
    full_run = {
        "epochs": 1.0,
        "patience": 1_000_000,
        "evaluate_every": 1_000_000,
        "feature": "trained",
        "feature_mix": 1.0,
    }
    ours = teacher_settings(workspace)
    short = {**ours, **full_run, **chosen.teacher}
    depth = load_base(workspace.base).layers
    usual = TeacherConfig.of(short)
    for variation in teacher_axes(depth):
        config = TeacherConfig.of({**short, **variation.changes})
        changes = {**short, **variation.changes}
        middle = variation.changes == {"layer": max(1, round(depth / 2))} and usual.layer is None
        default = config == usual or middle
        if variation.axis == "feature":
            default = variation.value == ours.get("feature", "trained")
        elif variation.axis == "share of the adapter":
            # Not in `ours` if the teacher's training chose it.
            default = variation.changes["feature_mix"] == workspace.teacher.manifest.feature_mix

        def make(changes: dict[str, Any] = changes) -> dict[str, Any]:
            teacher = teacher_variant(workspace, changes, data)
            figures = measured_teacher(workspace, teacher, train, foreign, chosen.seed)
            shutil.rmtree(teacher.folder)
            return figures

        key = {
            **workspace.identity(),
            "config": config.model_dump(mode="json"),
            "train": content_key(texts_of(train)),
            "foreign": content_key(texts_of(foreign)),
            "seed": chosen.seed,
        }
        yield Cell("teacher", variation.axis, variation.value, default, key, make)


def measured_teacher(
    workspace: Workspace, teacher: RefTeacher, train: Sequence[Example], foreign: Sequence[Example], seed: int
) -> dict[str, Any]:
    """AUROC on foreign rows at the layer chosen by validation, and at every layer."""
    label_B = labels_of(foreign)
    scorer = load_scorer(teacher.folder, workspace.base, "float32")
    score_B = torch.tensor([found.score for found in scorer.score(texts_of(foreign))], dtype=torch.float64)
    return {
        "chosen_layer": teacher.manifest.layer,
        "validation_auroc": teacher.manifest.quality.auroc,
        "auroc": AurocBootstrap([score_B], label_B, seed).interval(0).as_list(),
        "auprc": auprc(score_B, label_B),
        "recall_at_1_fpr": recall_at_fpr(score_B, label_B, 0.01),
        "by_layer": _by_layer(teacher, workspace, train, foreign),
    }


def _by_layer(
    teacher: RefTeacher, workspace: Workspace, train: Sequence[Example], foreign: Sequence[Example]
) -> dict[str, float]:
    """AUROC with R_l of every layer; texts longer than the context are skipped."""
    device = workspace.config.device
    base = teacher.base(workspace.base, device=device)
    model, fmt = teacher.standalone(base, teacher.manifest.feature_mix), ChatFormat(base.tokenizer)
    layers = list(range(1, base.layers + 1))
    sets = [[fmt.encode(Example(row.prompt, row.label)) for row in part] for part in (train, foreign)]
    reference, asked = ([row for row in part if len(row) <= base.context] for part in sets)
    features = [prompt_features(model.eval(), part, layers, fmt.pad_id, device) for part in (reference, asked)]
    made = teacher.manifest
    readouts = fit_readouts(features[0], encoded_labels(reference), Geometry(made.geometry), made.shrinkage or 0.2)
    label_B = encoded_labels(asked)
    return {str(layer): auroc(readout.score(features[1][layer]), label_B) for layer, readout in readouts.items()}


def thinned(rows: Sequence[Example], count: int) -> list[Example]:
    """Every n-th row, so that all sources keep their shares; at most `count` rows."""
    step = max(1, -(-len(rows) // count))
    return list(rows[::step])


def _students(workspace: Workspace, chosen: AblationSettings) -> Iterator[Cell]:
    """Students of unfiltered rows, whose safety depends on distillation only."""
    students, rows = _students_and_rows(workspace, chosen)
    usual = students.config({"method": "distill"})
    for variation in student_axes():
        config = students.config({"method": "distill", **variation.changes})

        def make(config: FinetuneConfig = config, variation: Variation = variation) -> dict[str, Any]:
            workspace.log(f"ablation: {variation.axis} = {variation.value}")
            return _trained(students, config, rows)

        key = _student_key(students, config, rows)
        yield Cell("student", variation.axis, variation.value, config == usual, key, make)


def _thresholds(workspace: Workspace, chosen: AblationSettings) -> Iterator[Cell]:
    """tau: guided students of the rows that the filter keeps."""
    students, rows = _students_and_rows(workspace, chosen)
    limits = workspace.teacher.manifest.thresholds
    values = {
        "0": 0.0,
        "review": limits.review,
        "block": limits.block,
        "halfway to 1": (1 + limits.block) / 2,
        "1 (no filter)": 1.0,
    }
    config = students.config({"method": "guided"})
    for name, tau in values.items():

        def make(tau: float = tau) -> dict[str, Any]:
            workspace.log(f"ablation: tau = {tau:.3f}")
            filtered = students.filter(rows, workspace.out / "ablation" / "filter", threshold=tau)
            return {"tau": tau, "dropped": filtered.dropped, **_trained(students, config, filtered.kept)}

        key = {**_student_key(students, config, rows), "tau": tau}
        yield Cell("tau", _TAU, name, name == "block", key, make)


def _students_and_rows(workspace: Workspace, chosen: AblationSettings) -> tuple[Students, list[Example]]:
    students = Students(workspace, chosen.task, chosen.student, chosen.seed, chosen.evaluated)
    return students, workspace.rows.user(students.task, chosen.rows, chosen.harmful_ratio, chosen.seed)


def _trained(students: Students, config: FinetuneConfig, rows: Sequence[Example]) -> dict[str, Any]:
    folder = students.workspace.out / "ablation"
    figures = students.run(config, rows, folder, gate=True)
    shutil.rmtree(folder)
    return {"rows": len(rows), **figures}


def _student_key(students: Students, config: FinetuneConfig, rows: Sequence[Example]) -> dict[str, Any]:
    identity = {**students.workspace.identity(), "version": SECTION.version}
    return {**identity, **students.key(config), "rows": content_key(texts_of(rows))}


SECTION = Section("ablations", "Ablations", run, render, version=2, gather=gather, settings=AblationSettings)
