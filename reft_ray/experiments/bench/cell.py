"""One grid cell: a user's rows, one method, a student and its figures."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from reft_ray.core.errors import ReftError
from reft_ray.experiments.bench.defence_edits import edit_rows, edit_student
from reft_ray.experiments.bench.methods import METHODS
from reft_ray.experiments.bench.shared_models import initial_adapter
from reft_ray.experiments.bench.students import Students
from reft_ray.experiments.bench.workspace import Workspace
from reft_ray.experiments.meter import metered
from reft_ray.experiments.student import count_labels

KIND = "cells"
"""The folder of cells in a workspace."""

VERSION = 5
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
        filtered = "-filter" if self.filtered else ""
        return f"{self.task}-{self.harmful_ratio:g}-{self.n}-s{self.seed}-{self.method}{filtered}"


def _students(workspace: Workspace, cell: Cell) -> Students:
    return Students(workspace, cell.task, METHODS[cell.method].student, cell.seed)


def cell_key(workspace: Workspace, cell: Cell) -> dict[str, Any]:
    """What a cell's figures depend on: rows, base and, where it is used, teacher by content; settings; the recipe.

    Seconds, memory and operations depend on the device and on whether operations are counted.
    """
    config, students = workspace.config, _students(workspace, cell)
    used = METHODS[cell.method].needs_teacher(cell.filtered)
    return {
        **(workspace.identity() if used else workspace.identity_without_teacher()),
        "version": VERSION,
        "cell": asdict(cell),
        "method": METHODS[cell.method].recipe,
        **students.key(students.config({})),
        "alignment_stage": config.alignment_stage,
        "edits": config.edits.model_dump(),
    }


def cached_cell(workspace: Workspace, cell: Cell) -> dict[str, Any]:
    """A cell's figures, from the cache or made now."""
    return workspace.cached(KIND, cell.name, cell_key(workspace, cell), lambda: run_cell(workspace, cell))


def run_cell(workspace: Workspace, cell: Cell) -> dict[str, Any]:
    """Filter, train, evaluate; returns figures, never the text of a row."""
    method, students, device = METHODS[cell.method], _students(workspace, cell), workspace.config.device
    start = initial_adapter(workspace, method.start)
    given = workspace.rows.user(cell.task, cell.n, cell.harmful_ratio, cell.seed)
    with tempfile.TemporaryDirectory(dir=workspace.out, prefix=".cell-") as scratch:
        folder = Path(scratch)
        kept, dropped = given, count_labels(())
        if cell.filtered:
            filtered = students.filter(given, folder / "filter", precision="auto")
            kept, dropped = filtered.kept, filtered.dropped
            if len(kept) == len(given):
                # The same rows make the same student.
                return cached_cell(workspace, replace(cell, filtered=False))
        with metered(device=device) as editing:
            trained = edit_rows(workspace, method.before, kept, cell.seed)
        if not trained:
            raise ReftError("no row is left to train on")
        figures = students.run(
            students.config({"init_adapter": str(start) if start else None}),
            trained,
            folder,
            lambda student: edit_student(workspace, method.after, student, start, folder / "edited"),
        )
    return {
        **figures,
        "rows": count_labels(given),
        "dropped": dropped,
        "trained_rows": len(trained),
        "seconds": round(figures["seconds"] + editing.seconds, 1),
        "peak_mib": max(figures["peak_mib"], round(editing.peak_mib)),
    }
