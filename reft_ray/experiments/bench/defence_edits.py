"""Defences that edit a user's rows before training, or the student's weights after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from reft_ray.baselines.antidote import antidote, input_norms
from reft_ray.baselines.larf import danger, kept_rows
from reft_ray.baselines.safe_instruct import safe_instruct
from reft_ray.baselines.safe_lora import safe_lora
from reft_ray.core.batch import collate, micro_batches, numbered
from reft_ray.core.conversation import Example, Label
from reft_ray.core.errors import ReftError
from reft_ray.experiments.bench.workspace import Workspace
from reft_ray.experiments.real_rows import complying
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.forward import ModelForward
from reft_ray.hf.loading import Base, load_base
from reft_ray.hf.lora import weight_deltas

_FEATURE_TOKENS = 8192


def edit_rows(
    workspace: Workspace, edit: Literal["safe_instruct", "larf"] | None, rows: Sequence[Example], seed: int
) -> list[Example]:
    """The rows to train on."""
    settings = workspace.config.edits
    if edit == "safe_instruct":
        refusals = [row for row in workspace.alignment_rows if row.label is Label.HARMFUL]
        return safe_instruct(rows, refusals, settings.safe_instruct_share, seed)
    if edit == "larf":
        safe = [row for row in workspace.alignment_rows if row.label is Label.HARMFUL][: settings.larf_references]
        features = [last_features(workspace, part) for part in (rows, complying(safe), safe)]
        return [rows[place] for place in kept_rows(danger(*features), settings.larf_drop_share)]
    return list(rows)


@torch.inference_mode()
def last_features(workspace: Workspace, rows: Sequence[Example]) -> Tensor:
    """The aligned model's feature of the last token of prompt and response, [B, D], at the teacher's layer."""
    device = workspace.config.device
    teacher = workspace.teacher
    base = teacher.base(workspace.base, device=device)
    chat = ChatFormat(base.tokenizer)
    forward = ModelForward(teacher.standalone(base))
    # LARF searches its layer by scaling weights; refusals separate best at the teacher's.
    encoded = numbered(chat.encode(row) for row in rows)
    most = base.context
    whole = [
        replace(row, ids=row.ids[:most], loss_mask=row.loss_mask[:most], last_prompt_index=min(len(row), most) - 1)
        for row in encoded
    ]
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    for batch in micro_batches(whole, _FEATURE_TOKENS, chat.pad_id, device):
        feature_BD = forward.features(batch, teacher.manifest.layer)
        for place, feature_D in zip(batch.index_B.tolist(), feature_BD.float().cpu(), strict=True):
            found[place] = feature_D
    return torch.stack(found)


def edit_student(
    workspace: Workspace,
    edit: Literal["safe_lora", "antidote"] | None,
    student: Path,
    start: Path | None,
    out: Path,
) -> Path:
    """The student to evaluate: the adapter itself, or a full model with an edited update, in `out`."""
    if edit is None:
        return student
    if start is None:
        raise ReftError(f"{edit} edits the update of an aligned model: the method must start from an aligned adapter")
    aligned, trained = weight_deltas(start), weight_deltas(student)
    base = load_base(workspace.base, device=workspace.config.device)
    linear = {name: module for name, module in base.model.named_modules() if isinstance(module, nn.Linear)}
    settings = workspace.config.edits
    norms: dict[str, Tensor] = {}
    if edit == "antidote":
        _add(linear, trained)
        norms = _harmful_norms(workspace, base, {name: linear[name] for name in trained})
        _add(linear, {name: -delta_OI for name, delta_OI in trained.items()})
    for name, aligned_OI in aligned.items():
        update_OI = trained[name] - aligned_OI
        if edit == "antidote":
            edited_OI = antidote(update_OI, norms[name].cpu(), settings.antidote_dense)
        else:
            edited_OI, _ = safe_lora(aligned_OI, update_OI, settings.safe_lora_threshold)
        _add(linear, {name: aligned_OI + edited_OI})
    base.model.save_pretrained(out)
    base.tokenizer.save_pretrained(out)
    return out


@torch.no_grad()
def _add(linear: dict[str, nn.Linear], deltas: dict[str, Tensor]) -> None:
    for name, delta_OI in deltas.items():
        weight = linear[name].weight
        weight.add_(delta_OI.to(device=weight.device, dtype=weight.dtype))


@torch.inference_mode()
def _harmful_norms(workspace: Workspace, base: Base, layers: dict[str, nn.Linear]) -> dict[str, Tensor]:
    """Norms of each layer's inputs on harmful rows; one row at a time, so that no padding counts."""
    chat, forward = ChatFormat(base.tokenizer), ModelForward(base.model)
    rows = workspace.harmful_rows(workspace.config.edits.antidote_rows)
    with input_norms(layers) as norms:
        for row in rows:
            encoded = chat.encode(row)
            if len(encoded) <= base.context:
                forward.logits(collate([encoded], chat.pad_id, workspace.config.device))
    return norms
