"""What each method costs beside plain LoRA finetuning of the same rows: time, peak memory, operations.

Times are of optimiser steps alone, without loading and saving; contenders train by turns, round after round, and are
compared with plain finetuning of their own round. Memory and operations are measured in a process of their own.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import Field, field_validator

from reft_ray.core.conversation import Example
from reft_ray.experiments.bench.cell import behind_filter
from reft_ray.experiments.bench.config import BenchConfig
from reft_ray.experiments.bench.meter import metered
from reft_ray.experiments.bench.sections import Section
from reft_ray.experiments.bench.starts import alignment_rows, harmful_rows, start_adapter
from reft_ray.experiments.bench.weight_edits import edit_rows, edit_student
from reft_ray.experiments.bench.workspace import Workspace
from reft_ray.experiments.plots import plot_costs
from reft_ray.finetuning.config import Config, FinetuneConfig, all_known
from reft_ray.finetuning.trainer import FinetuneInputs, finetune

PLAIN = "plain LoRA SFT"
AIMS = {"guided, cached, 1:4": 1.3, "guided, cached, 1:1": 2.1}
"""Most seconds per step, relative to plain finetuning."""

_HARD = {"method": "distill", "labels": "hard"}
_CACHED = {"method": "distill"}
_LIVE = {"method": "distill", "teacher_forward": "live"}


@dataclass(frozen=True, slots=True)
class Contender:
    """`settings` are FinetuneConfig keys; `second` says which rows the second stream holds, where it is read.

    Every contender's first stream are the same rows, an alignment stage's too, so that steps can be compared.
    """

    settings: Mapping[str, Any]
    start: bool = False
    second: str = "alignment"


CONTENDERS: Mapping[str, Contender] = {
    PLAIN: Contender({"method": "sft"}),
    "guided, cached, 1:4": Contender({**_CACHED, "alignment_ratio": 0.25}),
    "guided, cached, 1:1": Contender({**_CACHED, "alignment_ratio": 1.0}),
    "guided, live teacher, 1:1": Contender({**_LIVE, "alignment_ratio": 1.0}),
    "hard labels, 1:1": Contender({**_HARD, "alignment_ratio": 1.0}),
    "Lisa": Contender({**_HARD, "step": "lisa", "alignment_ratio": 1.0}, start=True),
    "LDIFS": Contender({"method": "sft", "step": "ldifs"}, start=True),
    "Vaccine, alignment stage": Contender({"method": "sft", "step": "vaccine"}),
    "Booster, alignment stage, 1:1": Contender({**_HARD, "step": "booster", "alignment_ratio": 1.0}, second="harmful"),
}


class CostSettings(Config):
    """How much is measured: rows of one epoch, and rounds of all contenders."""

    task: str = "sst2"
    n: int = Field(240, ge=2)
    rounds: int = Field(5, ge=1)
    contenders: tuple[str, ...] = tuple(CONTENDERS)

    @field_validator("contenders")
    @classmethod
    def _comparable(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if PLAIN not in names:
            raise ValueError(f"name {PLAIN!r} too: the others are compared with it")
        return all_known("contender", names, CONTENDERS)


@dataclass(slots=True)
class _Steps:
    """Seconds of every step but the first, which warms up."""

    seconds: list[float] = field(default_factory=list)

    def __call__(self, metrics: Mapping[str, Any]) -> None:
        if metrics["step"] > 1 and metrics["step_seconds"] > 0:
            self.seconds.append(metrics["step_seconds"])


def run(workspace: Workspace, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Measure every contender. Rounds and contenders are kept as they are made, so that an interrupted run goes on."""
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
            **workspace.cached("costs", "alone", {**key, "alone": name}, partial(_alone, workspace, chosen, name)),
        }
    plain = measured[PLAIN]["flops"]
    for figures in measured.values():
        figures["flops_ratio"] = figures["flops"] / plain
    return {"settings": chosen.model_dump(mode="json"), "contenders": measured, "around": _around(workspace, chosen)}


def _round(workspace: Workspace, chosen: CostSettings, number: int) -> dict[str, float]:
    """Seconds of the steps of every contender, one after the other."""
    workspace.say(f"costs: round {number + 1} of {chosen.rounds}")
    return {name: sum(train(workspace, name, chosen)) for name in chosen.contenders}


def train(workspace: Workspace, name: str, chosen: CostSettings) -> list[float]:
    """One epoch; seconds of its steps."""
    contender, steps = CONTENDERS[name], _Steps()
    start = start_adapter(workspace, "teacher") if contender.start else None
    config = FinetuneConfig.of(
        {
            "base": workspace.base,
            **workspace.config.student,
            "epochs": 1,
            "min_steps": 0,
            "log_every": 1,
            "checkpoint_every": 1_000_000,
            **contender.settings,
            "init_adapter": str(start) if start else None,
        }
    )
    rows = _user(workspace, chosen)
    second: Sequence[Example] = ()
    if config.needs_alignment:
        second = harmful_rows(workspace, chosen.n) if contender.second == "harmful" else alignment_rows(workspace)
    with tempfile.TemporaryDirectory(dir=workspace.out, prefix=".cost-") as scratch:
        folder = Path(scratch)
        inputs = FinetuneInputs(rows, len(rows), second, workspace.teacher)
        finetune(config, inputs, folder / "student", workspace.resources(folder / "runs"), progress=steps)
    return steps.seconds


def _user(workspace: Workspace, chosen: CostSettings) -> list[Example]:
    return workspace.rows.user(chosen.task, chosen.n, 0.1, 0)


def _alone(workspace: Workspace, chosen: CostSettings, name: str) -> dict[str, Any]:
    """Peak memory and operations in a fresh process, where no other contender has grown the heap."""
    workspace.say(f"costs: memory and operations of {name}")
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


def _around(workspace: Workspace, chosen: CostSettings) -> dict[str, float]:
    """Seconds of what happens once per job before and after training, on the same rows."""
    rows = _user(workspace, chosen)
    start = start_adapter(workspace, "teacher")
    assert start is not None
    found = {}
    with tempfile.TemporaryDirectory(dir=workspace.out, prefix=".cost-") as scratch:
        folder = Path(scratch)
        with metered() as cost:
            behind_filter(workspace, rows, folder)
        found["filter in front"] = cost.seconds
        with metered() as cost:
            edit_rows(workspace, "larf", rows, 0)
        found["LARF ranking"] = cost.seconds
        with metered() as cost:
            edit_student(workspace, "safe_lora", start, start, folder / "safe_lora")
        found["SafeLoRA projection"] = cost.seconds
        with metered() as cost:
            edit_student(workspace, "antidote", start, start, folder / "antidote")
        found["Antidote pruning"] = cost.seconds
    return found


def render(result: Mapping[str, Any], pictures: Path) -> str:
    """Markdown of the costs."""
    chosen, contenders = result["settings"], result["contenders"]
    plot_costs({name: (row["ratio"], row["flops_ratio"]) for name, row in contenders.items()}, pictures / "costs.png")
    lines = [
        f"One epoch over {chosen['n']} rows of {chosen['task']}; times are medians of {chosen['rounds']} rounds in "
        "which all methods trained by turns, of optimiser steps alone. 1:4 and 1:1 are alignment to user tokens. "
        "Methods not listed train as plain finetuning does; an alignment stage is paid once per base, on its own rows.",
        "",
        "| method | seconds | time, relative | in the rounds | operations, relative | peak MiB | aim |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in contenders.items():
        aim = AIMS.get(name)
        verdict = "" if aim is None else f"≤ {aim}: {'met' if row['ratio'] <= aim else 'missed'}"
        lines.append(
            f"| {name} | {row['seconds']:.2f} | {row['ratio']:.2f} | {min(row['ratios']):.2f}-{max(row['ratios']):.2f} "
            f"| {row['flops_ratio']:.2f} | {row['peak_mib']:.0f} | {verdict} |"
        )
    lines += ["", "Once per job, loading of the models included:", "", "| | seconds |", "|---|---|"]
    lines += [f"| {name} | {seconds:.2f} |" for name, seconds in result["around"].items()]
    lines += ["", f"![costs]({pictures.name}/costs.png)"]
    return "\n".join(lines)


SECTION = Section("costs", "Costs", run, render, settings=CostSettings)
