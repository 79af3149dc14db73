"""Where students start from, and the provider's own alignment rows."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reft_ray.core.conversation import Example, Label
from reft_ray.core.errors import ReftError
from reft_ray.experiments.bench.methods import Start
from reft_ray.experiments.bench.workspace import Workspace, content_key
from reft_ray.finetuning.config import FinetuneConfig
from reft_ray.finetuning.trainer import FinetuneInputs, finetune

_STEPS: Mapping[str, Mapping[str, Any]] = {
    "vaccine": {"method": "sft", "step": "vaccine"},
    "booster": {"method": "distill", "labels": "hard", "step": "booster", "alignment_ratio": 1.0},
}


def alignment_rows(workspace: Workspace) -> list[Example]:
    """Refusals and helpful answers, half each where there are enough; the same ones for every method."""
    half = workspace.config.alignment_rows // 2
    return [row for label in Label for row in _drawn(workspace.rows.alignment, label, half)]


def harmful_rows(workspace: Workspace, count: int) -> list[Example]:
    """Harmful prompts of the provider with complying answers, for defences that need them."""
    return _drawn(workspace.rows.complied, Label.HARMFUL, count)


def _drawn(rows: Sequence[Example], label: Label, count: int) -> list[Example]:
    of_label = [row for row in rows if row.label is label]
    random.Random(f"bench/{label}").shuffle(of_label)  # noqa: S311 - an order, not a secret
    return of_label[:count]


def start_adapter(workspace: Workspace, start: Start) -> Path | None:
    """The adapter that a method starts from, made once where the defence aligns the base itself."""
    if start == "base":
        return None
    if start == "teacher":
        if workspace.teacher.manifest.weights != "lora":
            raise ReftError(f"{workspace.teacher.id} has full weights: students cannot start from it")
        return workspace.teacher.folder / "adapter"
    config = workspace.config
    settings = FinetuneConfig.of({"base": workspace.base, **config.alignment_stage, **_STEPS[start]})
    key = [settings.model_dump(mode="json", exclude={"base"}), config.alignment_rows, workspace.world_identity()]
    folder = workspace.out / f"{start}-{content_key(key)}"

    def align(storage: Path) -> None:
        rows = alignment_rows(workspace)
        random.Random("bench").shuffle(rows)  # noqa: S311 - an order, not a secret
        harmful = harmful_rows(workspace, len(rows) // 2) if settings.needs_alignment else ()
        inputs = FinetuneInputs(rows, len(rows), harmful)
        finetune(settings, inputs, folder, workspace.resources(storage), run_id=start)

    return workspace.trained(folder, "adapter_config.json", f"aligning the base by {start}", align)
