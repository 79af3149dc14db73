"""The grid: cells in this process or as Ray tasks; each is cached at once, and one failure does not end the others."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from reft_ray.experiments.bench.cell import KIND, Cell, cached_cell, cell_key
from reft_ray.experiments.bench.config import BenchConfig
from reft_ray.experiments.bench.grid_tables import render
from reft_ray.experiments.bench.methods import METHODS, Start
from reft_ray.experiments.bench.section import Section
from reft_ray.experiments.bench.shared_models import initial_adapter
from reft_ray.experiments.bench.workspace import Workspace, time_left

_FAILED = "failed"


def cells_of(config: BenchConfig) -> list[Cell]:
    """Every cell once, in the order of the blocks; within a block, methods change fastest."""
    found: dict[Cell, None] = {}
    for block in config.blocks:
        for seed, n, task, ratio, method, filtered in itertools.product(
            block.seeds, block.sizes, block.tasks, block.harmful_ratios, block.methods, block.filters
        ):
            found[Cell(method, task, ratio, n, seed, filtered)] = None
    return list(found)


def run(workspace: Workspace, _settings: Mapping[str, Any]) -> dict[str, Any]:
    """Make the missing cells."""
    todo = [cell for cell in cells_of(workspace.config) if _stored(workspace, cell) is None]
    if not workspace.has_time:
        return gather(workspace, _settings)
    for task in {cell.task for cell in todo}:
        workspace.rows.task(task)
    outcomes = _on_ray(workspace, todo) if workspace.workers else _one_by_one(workspace, todo)
    started = time.perf_counter()
    for done, (cell, failure) in enumerate(outcomes, start=1):
        left = time_left(time.perf_counter() - started, done / len(todo))
        outcome = f"failed: {failure}" if failure else "done"
        workspace.log(f"cell {done} of {len(todo)}, {cell.name}: {outcome}; {left}")
        if failure:
            workspace.failures.append(f"{cell.name}: {failure}")
    return gather(workspace, _settings)


def _one_by_one(workspace: Workspace, todo: Sequence[Cell]) -> Iterator[tuple[Cell, str | None]]:
    for cell in todo:
        if not workspace.has_time:
            return
        yield make_cell(workspace, cell)


def make_cell(workspace: Workspace, cell: Cell) -> tuple[Cell, str | None]:
    """Run one cell and keep its figures or its error."""
    try:
        cached_cell(workspace, cell)
    except Exception as error:
        return _failed(workspace, cell, error, 0)
    _failure(workspace, cell).unlink(missing_ok=True)
    return cell, None


def _failed(workspace: Workspace, cell: Cell, error: Exception, line: int) -> tuple[Cell, str]:
    """Keep one line of the error message for the report; the next run tries the cell again."""
    message = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[line]}"
    path = _failure(workspace, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cell": asdict(cell), "error": message}) + "\n", encoding="utf-8")
    return cell, message


def _failure(workspace: Workspace, cell: Cell) -> Path:
    return workspace.path_of(_FAILED, cell.name, cell_key(workspace, cell))


def _on_ray(workspace: Workspace, todo: Sequence[Cell]) -> Iterator[tuple[Cell, str | None]]:
    """At most `workers` cells at a time; all nodes must have access to the directory of results."""
    import ray

    from reft_ray.finetuning.ray_runtime import set_threads

    if any(METHODS[cell.method].needs_teacher(cell.filtered) for cell in todo):
        workspace.log(f"Ref-Teacher {workspace.teacher.id}")
    remote = ray.remote(num_cpus=1, num_gpus=1 if workspace.config.device == "cuda" else 0, max_retries=1)
    config, out = workspace.config.model_dump(mode="json"), workspace.out

    def worker_workspace() -> Workspace:
        set_threads()
        return Workspace(BenchConfig.of(config), out)

    @remote
    def align(start: Start) -> None:
        initial_adapter(worker_workspace(), start)

    @remote
    def task(cell: Cell, _aligned: None) -> tuple[Cell, str | None]:
        return make_cell(worker_workspace(), cell)

    # Shared adapters are trained once, before the cells that need them and parallel to the others.
    starts = {start: align.remote(start) for start in dict.fromkeys(METHODS[cell.method].start for cell in todo)}
    waiting = list(reversed(todo))
    running: dict[Any, Cell] = {}
    while waiting or running:
        if not workspace.has_time:
            waiting = []
        while waiting and len(running) < workspace.workers:
            cell = waiting.pop()
            running[task.remote(cell, starts[METHODS[cell.method].start])] = cell
        if not running:
            return
        (ready,), _ = ray.wait(list(running), num_returns=1)
        cell = running.pop(ready)
        try:
            yield ray.get(ready)
        except ray.exceptions.RayError as error:
            # The task was lost. The last line of Ray's message is the cause; its traceback comes first.
            yield _failed(workspace, cell, error, -1)


def _stored(workspace: Workspace, cell: Cell) -> dict[str, Any] | None:
    return workspace.stored(KIND, cell.name, cell_key(workspace, cell))


def gather(workspace: Workspace, _settings: Mapping[str, Any]) -> dict[str, Any]:
    """Finished cells, failed ones and the number of those that were not run; empty if no cell was run."""
    made, failed, absent = [], [], 0
    for cell in cells_of(workspace.config):
        if (result := _stored(workspace, cell)) is not None:
            made.append({"cell": asdict(cell), **result})
            continue
        if (failure := _failure(workspace, cell)).is_file():
            failed.append({"name": cell.name, "error": json.loads(failure.read_text(encoding="utf-8"))["error"]})
        else:
            absent += 1
    return {"cells": made, "failed": failed, "not_run": absent} if made or failed else {}


SECTION = Section("grid", "The grid", run, render, gather=gather)
