"""The cost of each method relative to plain LoRA finetuning of the same rows: time, peak memory, operations.

Times are of optimiser steps, without loading and saving; in every round each contender trains once and is compared
with plain finetuning of the same round. Memory and operations are measured in a separate process.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import Field, field_validator

from reft_ray.core.conversation import Example
from reft_ray.experiments.bench.config import BenchConfig
from reft_ray.experiments.bench.defence_edits import edit_rows, edit_student
from reft_ray.experiments.bench.section import Section
from reft_ray.experiments.bench.shared_models import teacher_adapter
from reft_ray.experiments.bench.workspace import Workspace
from reft_ray.experiments.markdown import table
from reft_ray.experiments.meter import metered
from reft_ray.experiments.plots import plot_costs
from reft_ray.experiments.student import filter_rows, train_adapter
from reft_ray.finetuning.config import FinetuneConfig
from reft_ray.settings import Settings, all_known

PLAIN = "plain LoRA SFT"
AIMS = {"guided, cached, 1:4": 1.3, "guided, cached, 1:1": 2.1}
"""Most seconds per step, relative to plain finetuning."""

_HARD = {"method": "distill", "labels": "hard"}
_CACHED = {"method": "distill"}
_LIVE = {"method": "distill", "teacher_forward": "live"}


@dataclass(frozen=True, slots=True)
class Contender:
    """`settings` are FinetuneConfig keys. All contenders train on the same user rows, so that steps can be compared.

    `aligned` starts from the Ref-Teacher's adapter; `harmful` reads harmful rows in place of alignment rows.
    """

    settings: Mapping[str, Any]
    aligned: bool = False
    harmful: bool = False


CONTENDERS: Mapping[str, Contender] = {
    PLAIN: Contender({"method": "sft"}),
    "guided, cached, 1:4": Contender({**_CACHED, "alignment_ratio": 0.25}),
    "guided, cached, 1:1": Contender({**_CACHED, "alignment_ratio": 1.0}),
    "guided, live teacher, 1:1": Contender({**_LIVE, "alignment_ratio": 1.0}),
    "hard labels, 1:1": Contender({**_HARD, "alignment_ratio": 1.0}),
    "Lisa": Contender({**_HARD, "step": "lisa", "alignment_ratio": 1.0}, aligned=True),
    "LDIFS": Contender({"method": "sft", "step": "ldifs"}, aligned=True),
    "Vaccine, alignment stage": Contender({"method": "sft", "step": "vaccine"}),
    "Booster, alignment stage, 1:1": Contender({**_HARD, "step": "booster", "alignment_ratio": 1.0}, harmful=True),
}


class CostSettings(Settings):
    """Sizes: rows of one epoch, and rounds of all contenders."""

    task: str = "sst2"
    n: int = Field(240, ge=2)
    rounds: int = Field(5, ge=1)
    contenders: tuple[str, ...] = tuple(CONTENDERS)

    @field_validator("contenders")
    @classmethod
    def _comparable(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if PLAIN not in names:
            raise ValueError(f"add {PLAIN!r}: the others are compared with it")
        return all_known("contender", names, CONTENDERS)


@dataclass(slots=True)
class _Steps:
    """Seconds of every step but the first, which warms up."""

    seconds: list[float] = field(default_factory=list)

    def __call__(self, metrics: Mapping[str, Any]) -> None:
        if metrics["step"] > 1 and metrics["step_seconds"] > 0:
            self.seconds.append(metrics["step_seconds"])


def run(workspace: Workspace, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Measure every contender. Each round and contender is cached, so that an interrupted run resumes."""
    task = next(iter(workspace.rows.tasks)) if workspace.config.rows is None else CostSettings().task
    chosen = CostSettings.of({"task": task, **settings})
    key = {**SECTION.key(workspace), "settings": chosen.model_dump(mode="json")}
    rounds = [
        workspace.cached("costs", "round", {**key, "round": number}, partial(_round, workspace, chosen, number))
        for number in range(chosen.rounds)
    ]
    measured = {}
    for name in chosen.contenders:
        seconds = [timed[name] for timed in rounds]
        ratios = [timed[name] / timed[PLAIN] for timed in rounds]
        measured[name] = {
            "seconds": median(seconds),
            "ratio": median(ratios),
            "ratios": ratios,
            **workspace.cached("costs", "alone", {**key, "alone": name}, partial(_separately, workspace, chosen, name)),
        }
    plain = measured[PLAIN]["flops"]
    for figures in measured.values():
        figures["flops_ratio"] = figures["flops"] / plain
    around = _once_per_job(workspace, chosen)
    return {"settings": chosen.model_dump(mode="json"), "contenders": measured, "around": around}


def _round(workspace: Workspace, chosen: CostSettings, number: int) -> dict[str, float]:
    """Seconds of each contender's steps."""
    workspace.log(f"costs: round {number + 1} of {chosen.rounds}")
    return {name: sum(train(workspace, name, chosen)) for name in chosen.contenders}


def train(workspace: Workspace, name: str, chosen: CostSettings) -> list[float]:
    """Train one epoch; returns the seconds of its steps."""
    contender, steps = CONTENDERS[name], _Steps()
    config = FinetuneConfig.of(
        {
            "base": workspace.base,
            **workspace.config.student,
            "epochs": 1,
            "min_steps": 0,
            "log_every": 1,
            "checkpoint_every": 1_000_000,
            **contender.settings,
            "init_adapter": str(teacher_adapter(workspace)) if contender.aligned else None,
        }
    )
    second = workspace.harmful_rows(chosen.n) if contender.harmful else workspace.alignment_rows
    with tempfile.TemporaryDirectory(dir=workspace.out, prefix=".cost-") as scratch:
        folder = Path(scratch)
        rows, resources = _user(workspace, chosen), workspace.resources(folder / "runs")
        train_adapter(config, rows, workspace.teacher, folder / "student", resources, second, progress=steps)
    return steps.seconds


def _user(workspace: Workspace, chosen: CostSettings) -> list[Example]:
    return workspace.rows.user(chosen.task, chosen.n, 0.1, 0)


def _separately(workspace: Workspace, chosen: CostSettings, name: str) -> dict[str, Any]:
    """Peak memory and operations in a fresh process, whose heap no other contender has grown."""
    workspace.log(f"costs: memory and operations of {name}")
    job = (workspace.config.model_dump(mode="json"), str(workspace.out), name, chosen.model_dump(mode="json"))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, job)


def _measured(config: dict[str, Any], out: str, name: str, chosen: dict[str, Any]) -> dict[str, Any]:
    workspace, settings = Workspace(BenchConfig.of(config), Path(out)), CostSettings.of(chosen)
    with metered(device=workspace.config.device) as memory:
        train(workspace, name, settings)
    with metered(count_flops=True, device=workspace.config.device) as operations:
        train(workspace, name, settings)
    return {"peak_mib": memory.peak_mib, "flops": operations.flops}


def _once_per_job(workspace: Workspace, chosen: CostSettings) -> dict[str, float]:
    """Seconds of the steps before and after training, on the same rows."""
    rows, start = _user(workspace, chosen), teacher_adapter(workspace)
    found = {}
    with tempfile.TemporaryDirectory(dir=workspace.out, prefix=".cost-") as scratch:
        folder = Path(scratch)
        steps: Mapping[str, Callable[[], object]] = {
            "filter in front": lambda: filter_rows(
                rows, workspace.teacher, workspace.base, folder / "filter", precision="auto"
            ),
            "LARF ranking": lambda: edit_rows(workspace, "larf", rows, 0),
            "SafeLoRA projection": lambda: edit_student(workspace, "safe_lora", start, start, folder / "safe_lora"),
            "Antidote pruning": lambda: edit_student(workspace, "antidote", start, start, folder / "antidote"),
        }
        for name, step in steps.items():
            with metered() as cost:
                step()
            found[name] = cost.seconds
    return found


def render(result: Mapping[str, Any], pictures: Path) -> str:
    """Markdown of the costs."""
    chosen, contenders = result["settings"], result["contenders"]
    plot_costs({name: (row["ratio"], row["flops_ratio"]) for name, row in contenders.items()}, pictures / "costs.png")
    head = ("method", "seconds", "time, relative", "range over rounds", "operations, relative", "peak MiB", "aim")
    rows = []
    for name, row in contenders.items():
        aim = AIMS.get(name)
        rows.append(
            (
                name,
                f"{row['seconds']:.2f}",
                f"{row['ratio']:.2f}",
                f"{min(row['ratios']):.2f}-{max(row['ratios']):.2f}",
                f"{row['flops_ratio']:.2f}",
                f"{row['peak_mib']:.0f}",
                "" if aim is None else f"≤ {aim}: {'met' if row['ratio'] <= aim else 'missed'}",
            )
        )
    lines = [
        *table(("task", "rows", "rounds"), [(chosen["task"], chosen["n"], chosen["rounds"])]),
        "",
        "Optimiser steps of one epoch, medians over rounds. 1:4 and 1:1: alignment tokens to user tokens.",
        "",
        *table(head, rows),
        "",
        *table(("once per job", "seconds"), ((name, f"{value:.2f}") for name, value in result["around"].items())),
        "",
        f"![costs]({pictures.name}/costs.png)",
    ]
    return "\n".join(lines)


SECTION = Section("costs", "Costs", run, render, version=2, settings=CostSettings)
