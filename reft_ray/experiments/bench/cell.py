"""One cell: a user's rows, one method, a student, and what came of it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from reft_ray.core.conversation import Example, Label
from reft_ray.core.errors import ReftError
from reft_ray.experiments.bench.meter import metered
from reft_ray.experiments.bench.methods import METHODS
from reft_ray.experiments.bench.rows import some
from reft_ray.experiments.bench.starts import alignment_rows, start_adapter
from reft_ray.experiments.bench.weight_edits import edit_rows, edit_student
from reft_ray.experiments.bench.workspace import Workspace
from reft_ray.experiments.evaluate import evaluate_student
from reft_ray.finetuning.config import FinetuneConfig
from reft_ray.finetuning.trainer import FinetuneInputs, finetune
from reft_ray.hf.ref_teacher import load_scorer
from reft_ray.screening.config import ScreenConfig
from reft_ray.screening.dataset import screen
from reft_ray.screening.kept import kept_rows
from reft_ray.testbed.rows import write_chat_rows

KIND = "cells"
"""Where cells lie in a workspace."""

VERSION = 2
"""Raised when a change of the code makes older cells wrong."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A place in the grid."""

    method: str
    task: str
    harmful_ratio: float
    n: int
    seed: int
    filtered: bool

    @property
    def name(self) -> str:
        """Readable, and unique within a comparison."""
        behind = "-filter" if self.filtered else ""
        return f"{self.task}-{self.harmful_ratio:g}-{self.n}-s{self.seed}-{self.method}{behind}"


def cell_key(workspace: Workspace, cell: Cell) -> dict[str, Any]:
    """What a cell's figures depend on: rows, base and, where it is used, teacher by content; settings; the recipe.

    Seconds, memory and operations hang on the device and on whether operations are counted.
    """
    config = workspace.config
    used = METHODS[cell.method].needs_teacher(cell.filtered)
    return {
        **(workspace.identity() if used else workspace.world_identity()),
        "version": VERSION,
        "cell": asdict(cell),
        "method": METHODS[cell.method].recipe,
        "student": student_config(workspace, cell).model_dump(mode="json", exclude={"base", "init_adapter"}),
        "alignment_stage": config.alignment_stage,
        "alignment_rows": config.alignment_rows,
        "edits": config.edits.model_dump(),
        "evaluation": config.evaluation.model_dump(),
        "device": config.device,
        "count_flops": config.count_flops,
    }


def student_config(workspace: Workspace, cell: Cell, start: Path | None = None) -> FinetuneConfig:
    """Stage 2 of a cell: the comparison's settings with what the method changes."""
    return FinetuneConfig.of(
        {
            "base": workspace.base,
            "checkpoint_every": 1_000_000,
            **workspace.config.student,
            **METHODS[cell.method].student,
            "init_adapter": str(start) if start else None,
            "seed": cell.seed,
        }
    )


def cached_cell(workspace: Workspace, cell: Cell) -> dict[str, Any]:
    """A cell's figures, kept under its key, made where they are not there yet."""
    return workspace.cached(KIND, cell.name, cell_key(workspace, cell), lambda: run_cell(workspace, cell))


def run_cell(workspace: Workspace, cell: Cell) -> dict[str, Any]:
    """Filter, train, evaluate; returns figures alone, never a row's text."""
    method, rows = METHODS[cell.method], workspace.rows
    config, evaluation = workspace.config, workspace.config.evaluation
    task = rows.task(cell.task)
    start = start_adapter(workspace, method.start)
    settings = student_config(workspace, cell, start)
    given = rows.user(cell.task, cell.n, cell.harmful_ratio, cell.seed)
    with tempfile.TemporaryDirectory(dir=workspace.out, prefix=".cell-") as scratch:
        folder = Path(scratch)
        kept = behind_filter(workspace, given, folder) if cell.filtered else given
        if cell.filtered and len(kept) == len(given):
            # The same rows make the same student.
            return cached_cell(workspace, replace(cell, filtered=False))
        with metered(device=config.device) as editing:
            trained = edit_rows(workspace, method.before, kept, cell.seed)
        if not trained:
            raise ReftError("no row is left to train on")
        with metered(count_flops=config.count_flops, device=config.device) as cost:
            student = train_student_of(workspace, settings, trained, folder)
        with metered(device=config.device) as finishing:
            student = edit_student(workspace, method.after, student, start, folder / "edited")
        figures = evaluate_student(
            workspace.respond(student, task),
            some(rows.hs_prompts, evaluation.harmful),
            some(rows.over_refusal_prompts, evaluation.harmless),
            some(task.test, evaluation.task),
            task.match,
            seed=cell.seed,
        )
    return {
        **figures,
        "prompts": {
            "harmful": min(evaluation.harmful, len(rows.hs_prompts)),
            "harmless": min(evaluation.harmless, len(rows.over_refusal_prompts)),
            "task": min(evaluation.task, len(task.test)),
        },
        "rows": count(given),
        "dropped": {label: count(given)[label] - count(kept)[label] for label in count(given)},
        "trained_rows": len(trained),
        "seconds": round(cost.seconds + editing.seconds + finishing.seconds, 1),
        "peak_mib": round(max(cost.peak_mib, editing.peak_mib, finishing.peak_mib)),
        "flops": cost.flops,
    }


def train_student_of(workspace: Workspace, settings: FinetuneConfig, rows: Sequence[Example], folder: Path) -> Path:
    """Stage 2 in this process; soft labels are shared by all cells."""
    resources = workspace.resources(folder / "runs")
    alignment = alignment_rows(workspace) if settings.needs_alignment else ()
    soft = settings.method.distills and settings.labels == "soft"
    inputs = FinetuneInputs(rows, len(rows), alignment, workspace.teacher if soft else None)
    return finetune(settings, inputs, folder / "student", resources)


def behind_filter(workspace: Workspace, rows: Sequence[Example], folder: Path) -> list[Example]:
    """The rows that the Ref-Teacher keeps: nobody reviews here, so tau is its block threshold."""
    write_chat_rows(folder / "user.jsonl", rows)
    teacher = workspace.teacher
    threshold = teacher.manifest.thresholds.block
    factory = partial(load_scorer, teacher.folder, workspace.base, "auto", threshold)
    out = folder / "screened"
    shutil.rmtree(out, ignore_errors=True)
    screen([str(folder / "user.jsonl")], str(out), factory, ScreenConfig(findings=False))
    return [rows[number - 1] for number, _ in kept_rows(str(out))]


def count(rows: Sequence[Example]) -> dict[str, int]:
    """Rows by true label."""
    return {label.value: sum(row.label is label for row in rows) for label in Label}
