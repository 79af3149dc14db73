"""The conflict of task and safety gradients, measured at the checkpoints of a student's training.

It is the reason for the method's design (arXiv 2506.07356, section 4). Measured for soft and hard labels, base and
aligned initial weights, with and without the harmful rows.
"""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from reft_ray.core.batch import answered, micro_batches
from reft_ray.core.conflict import gradient_conflict
from reft_ray.core.conversation import Example, Label
from reft_ray.core.guided import Distillation
from reft_ray.evaluation.intervals import bootstrap
from reft_ray.experiments.ablations.tables import render_conflict
from reft_ray.experiments.bench.section import Section
from reft_ray.experiments.bench.workspace import Workspace
from reft_ray.finetuning.checkpoint import read_state, restore_weights, trainable
from reft_ray.finetuning.config import FinetuneConfig
from reft_ray.finetuning.encoding import alignment_rows, encode_rows
from reft_ray.finetuning.model import STUDENT, TrainableModel, load_trainable, start_from_teacher
from reft_ray.finetuning.runtime import LocalRuntime
from reft_ray.finetuning.student_loop import train_student
from reft_ray.finetuning.targets import distillation_of, ensure_soft_targets
from reft_ray.settings import Settings


class ConflictSettings(Settings):
    """`pairs` of a task batch and an alignment batch with `batch_rows` rows each, at up to `points` checkpoints."""

    task: str | None = None
    rows: int = Field(320, ge=2)
    harmful_ratio: float = Field(0.3, gt=0, lt=1)
    epochs: float = Field(2.0, gt=0)
    batch_rows: int = Field(16, ge=1)
    pairs: int = Field(12, ge=2)
    points: int = Field(4, ge=1)
    seed: int = Field(0, ge=0)


def run(workspace: Workspace, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Eight trainings: initial weights x labels x rows, each cached separately."""
    chosen = ConflictSettings.of(settings)
    common = {**SECTION.key(workspace), "settings": chosen.model_dump(mode="json")}
    runs = []
    for init, labels, poisoned in product(("base", "aligned"), ("hard", "soft"), (True, False)):
        case = {"init": init, "labels": labels, "poisoned": poisoned}

        def measured(case: dict[str, Any] = case) -> dict[str, Any]:
            workspace.log(f"gradient conflict: {case}")
            return {**case, "points": _trajectory(workspace, chosen, case)}

        runs.append(workspace.cached("conflict", "-".join(map(str, case.values())), {**common, **case}, measured))
    return {"runs": runs, "settings": chosen.model_dump(mode="json")}


def _trajectory(workspace: Workspace, chosen: ConflictSettings, case: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = user_rows(workspace, chosen, case["poisoned"])
    alignment = workspace.alignment_rows
    steps = math.ceil(chosen.epochs * len(rows) / chosen.batch_rows)
    config = FinetuneConfig.of(
        {
            "base": workspace.base,
            **workspace.config.student,
            "method": "distill",
            "labels": case["labels"],
            "init": case["init"],
            "epochs": chosen.epochs,
            "min_steps": 0,
            "batch_rows": chosen.batch_rows,
            # Rounded up: the last step is always a checkpoint and must not closely follow another one.
            "checkpoint_every": -(-steps // chosen.points),
            "seed": chosen.seed,
        }
    )
    folder = workspace.out / "conflict-run"
    shutil.rmtree(folder, ignore_errors=True)
    device = workspace.config.device
    targets = None
    if case["labels"] == "soft":
        targets = ensure_soft_targets(config, workspace.teacher, alignment, workspace.out / "targets", device).parent
    train_student(LocalRuntime(folder, device=device), config, rows, alignment, workspace.teacher, targets)
    points = _measured(workspace, chosen, config, rows, alignment, targets, folder)
    shutil.rmtree(folder, ignore_errors=True)
    return points


def user_rows(workspace: Workspace, chosen: ConflictSettings, poisoned: bool) -> list[Example]:
    """A user's rows, or the harmless ones among them, which a perfect filter would keep."""
    task = chosen.task or next(iter(workspace.rows.tasks))
    rows = workspace.rows.user(task, chosen.rows, chosen.harmful_ratio, chosen.seed)
    return rows if poisoned else [row for row in rows if row.label is not Label.HARMFUL]


def _measured(
    workspace: Workspace,
    chosen: ConflictSettings,
    config: FinetuneConfig,
    rows: Sequence[Example],
    alignment: Sequence[Example],
    targets: Path | None,
    folder: Path,
) -> list[dict[str, Any]]:
    """The conflict at the start and at every checkpoint, on the same batches."""
    torch.manual_seed(chosen.seed)
    runtime = LocalRuntime(device=workspace.config.device)
    trainable_model = load_trainable(config, runtime, STUDENT)
    if config.init == "aligned":
        start_from_teacher(trainable_model, workspace.teacher)
    encoded, _ = alignment_rows(trainable_model.chat, alignment, trainable_model.max_tokens)
    distillation = distillation_of(config, trainable_model, encoded, workspace.teacher, targets)
    user = answered(encode_rows(trainable_model.chat, rows, trainable_model.max_tokens).encoded)
    rng = random.Random(f"{chosen.seed}/pairs")  # noqa: S311
    size = chosen.batch_rows
    pairs = [
        (rng.sample(user, min(size, len(user))), rng.sample(encoded, min(size, len(encoded))))
        for _ in range(chosen.pairs)
    ]
    points = [{"progress": 0.0, **_point(trainable_model, pairs, distillation, runtime.device, chosen.seed)}]
    for checkpoint in sorted(folder.glob("checkpoint-*")):
        groups, document = read_state(checkpoint)
        restore_weights(trainable_model.model, groups["weights"])
        progress = document["state"]["rows_done"] / (config.epochs * len(rows))
        measured = _point(trainable_model, pairs, distillation, runtime.device, chosen.seed)
        points.append({"progress": progress, **measured})
    return points


def _point(
    trainable_model: TrainableModel, pairs: Sequence[Any], distillation: Distillation, device: torch.device, seed: int
) -> dict[str, Any]:
    # Without dropout, so that only the weights matter.
    trainable_model.model.eval()
    parameters = list(trainable(trainable_model.model).values())
    found = []
    for task, safety in pairs:
        user, alignment = (micro_batches(part, 1 << 20, trainable_model.chat.pad_id, device) for part in (task, safety))
        found.append(gradient_conflict(trainable_model.forward, parameters, user, alignment, distillation))
    cosines = [one.cosine for one in found]
    low, high = bootstrap(cosines, seed)
    return {
        "cosine": [sum(cosines) / len(cosines), low, high],
        "opposed": sum(cosine < 0 for cosine in cosines) / len(cosines),
        "task_norm": sum(one.task_norm for one in found) / len(found),
        "safety_norm": sum(one.safety_norm for one in found) / len(found),
    }


SECTION = Section("conflict", "Gradient conflict", run, render_conflict, version=2, settings=ConflictSettings)
