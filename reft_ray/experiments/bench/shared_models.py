"""Models that several cells share, trained once per workspace: aligned adapters and variants of the Ref-Teacher."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reft_ray.core.errors import ReftError
from reft_ray.experiments.bench.methods import Start
from reft_ray.experiments.bench.workspace import Workspace, content_key
from reft_ray.experiments.student import train_adapter
from reft_ray.finetuning.config import FinetuneConfig, TeacherConfig
from reft_ray.finetuning.teacher_loop import TeacherData
from reft_ray.hf.ref_teacher import RefTeacher

_ALIGNMENT_STEPS: Mapping[str, Mapping[str, Any]] = {
    "vaccine": {"method": "sft", "step": "vaccine"},
    "booster": {"method": "distill", "labels": "hard", "step": "booster", "alignment_ratio": 1.0},
}


def teacher_adapter(workspace: Workspace) -> Path:
    """The Ref-Teacher's adapter. Raises ReftError for a teacher with full weights."""
    if workspace.teacher.manifest.weights != "lora":
        raise ReftError(f"{workspace.teacher.id} has full weights: students cannot start from it")
    return workspace.teacher.folder / "adapter"


def initial_adapter(workspace: Workspace, start: Start) -> Path | None:
    """The adapter that a method starts from; a defence that aligns the base itself trains its adapter here once."""
    if start == "base":
        return None
    if start == "teacher":
        return teacher_adapter(workspace)
    config = workspace.config
    settings = FinetuneConfig.of({"base": workspace.base, **config.alignment_stage, **_ALIGNMENT_STEPS[start]})
    key = [
        settings.model_dump(mode="json", exclude={"base"}),
        config.alignment_rows,
        workspace.identity_without_teacher(),
    ]
    folder = workspace.out / f"{start}-{content_key(key)}"

    def align(storage: Path) -> None:
        rows = [*workspace.alignment_rows]
        random.Random("bench").shuffle(rows)  # noqa: S311 - an order, not a secret
        harmful = workspace.harmful_rows(len(rows) // 2)
        train_adapter(settings, rows, None, folder, workspace.resources(storage), harmful, run_id=start)

    return workspace.train_once(folder, "adapter_config.json", f"aligning the base by {start}", align)


def teacher_settings(workspace: Workspace) -> dict[str, Any]:
    """TeacherConfig keys that the comparison's teacher was trained with."""
    recorded = workspace.teacher.manifest.config
    known = {key: value for key, value in recorded.items() if key in TeacherConfig.model_fields}
    return {**(known or workspace.config.teacher_settings), "base": workspace.base}


def teacher_variant(workspace: Workspace, changes: Mapping[str, Any], data: TeacherData) -> RefTeacher:
    """The comparison's teacher with changed settings, trained once and kept in the workspace."""
    config = TeacherConfig.of({**teacher_settings(workspace), **changes})
    key = workspace.teacher_key(config, len(data.train))
    title = f"a teacher with {', '.join(f'{name}={value}' for name, value in changes.items())}"
    return workspace.train_teacher(workspace.out / "variants" / key, config, data, title)
