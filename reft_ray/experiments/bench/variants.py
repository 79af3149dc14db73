"""Teachers that differ from the comparison's own in one setting, for ablations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reft_ray.experiments.bench.workspace import Workspace, content_key
from reft_ray.finetuning.config import TeacherConfig
from reft_ray.finetuning.teacher_loop import TeacherData
from reft_ray.hf.ref_teacher import RefTeacher


def teacher_settings(workspace: Workspace) -> dict[str, Any]:
    """TeacherConfig keys that the comparison's teacher was made with."""
    recorded = workspace.teacher.manifest.config
    known = {key: value for key, value in recorded.items() if key in TeacherConfig.model_fields}
    return {**(known or workspace.config.teacher_settings), "base": workspace.base}


def teacher_variant(workspace: Workspace, changes: Mapping[str, Any], data: TeacherData | None = None) -> RefTeacher:
    """The comparison's teacher with changed settings, trained once and kept in the workspace."""
    rows = workspace.rows
    config = TeacherConfig.of({**teacher_settings(workspace), **changes})
    data = data or rows.teacher
    key = content_key([config.model_dump(mode="json"), rows.identity, len(data.train)])
    folder = workspace.out / "variants" / key
    title = f"a teacher with {', '.join(f'{k}={v}' for k, v in changes.items())}"
    return workspace.prepared(folder, config, data, title)
