"""The alignment term of a run, and its soft labels: made once per teacher, alignment set, temperature and K."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from reft_ray.core.batch import Batch, TokenizedExample
from reft_ray.core.conversation import Example
from reft_ray.core.errors import ReftError
from reft_ray.core.forward import Predictions
from reft_ray.core.guided import Distillation, cached_teacher, hard_labels
from reft_ray.finetuning.config import FinetuneConfig
from reft_ray.finetuning.encoding import alignment_rows
from reft_ray.finetuning.model import STUDENT, TrainableModel, compute_dtype
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.forward import ModelForward, bare_model
from reft_ray.hf.loading import context_of, load_tokenizer
from reft_ray.hf.lora import using_adapter
from reft_ray.hf.machine import tokens_that_fit
from reft_ray.hf.packing import enable_packing
from reft_ray.hf.ref_teacher import RefTeacher
from reft_ray.hf.soft_targets import StoredTargets, alignment_key, is_complete, key_name, write_soft_targets


def ensure_soft_targets(
    config: FinetuneConfig,
    teacher: RefTeacher,
    alignment: Sequence[Example],
    folder: Path,
    device: torch.device | str = "cpu",
    progress: Callable[[float], None] | None = None,
    share: tuple[int, int] = (0, 1),
) -> Path:
    """The soft labels in `folder`, computed now if they are missing, in the precision of the student's frozen weights.

    `share` (rank, processes) computes its part.
    """
    chat, rows, key = _wanted(config, teacher, alignment)
    path = folder / key_name(key)
    if not is_complete(path):
        dtype = compute_dtype(config, torch.device(device))
        model = teacher.standalone(teacher.base(config.base, dtype, str(device)))
        tokens = config.micro_batch_tokens or tokens_that_fit(model, device)
        packed = config.packing is not False and enable_packing(bare_model(model), model)
        forward = ModelForward(model)
        write_soft_targets(path, forward, rows, key, chat.pad_id, tokens, device, progress, share, packed)
    return path


def soft_targets_path(config: FinetuneConfig, teacher: RefTeacher, alignment: Sequence[Example], folder: Path) -> Path:
    """The path of these labels, which may not be complete yet; loads a tokenizer and no model."""
    return folder / key_name(_wanted(config, teacher, alignment)[2])


def soft_targets_on_worker(
    config: FinetuneConfig,
    teacher: RefTeacher,
    alignment: Sequence[Example],
    folder: Path,
    gpu: bool,
    share: tuple[int, int] = (0, 1),
) -> Path:
    """A share of the labels, computed on this machine's accelerator."""
    device = "cuda" if gpu and torch.cuda.is_available() else "cpu"
    return ensure_soft_targets(config, teacher, alignment, folder, device, share=share)


def distillation_of(
    config: FinetuneConfig,
    trainable_model: TrainableModel,
    encoded: Sequence[TokenizedExample],
    teacher: RefTeacher | None,
    targets_folder: Path | None,
) -> Distillation:
    """The alignment term of a configuration, on `encoded` rows as `alignment_rows` returns them."""
    if config.labels == "hard":
        return Distillation(hard_labels, config.distill_weight)
    if teacher is None:
        raise ReftError("soft labels need a Ref-Teacher")
    teacher.check(trainable_model.base, trainable_model.chat)
    if config.teacher_forward == "live":
        model = teacher.attach(trainable_model.model)
        model.set_adapter(STUDENT)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(f".{STUDENT}." in name)
        forward = ModelForward(model)

        @torch.no_grad()
        def teach(batch: Batch) -> Predictions:
            with using_adapter(model, "teacher"):
                return forward.predictions(batch)

        return Distillation(teach, config.distill_weight, config.temperature)
    if targets_folder is None:
        raise ReftError("cached soft labels need their folder")
    return cached_distillation(config, encoded, teacher, targets_folder)


def cached_distillation(
    config: FinetuneConfig, encoded: Sequence[TokenizedExample], teacher: RefTeacher, folder: Path
) -> Distillation:
    """The alignment term with the soft labels that `ensure_soft_targets` made in `folder` of these rows."""
    key = alignment_key(encoded, teacher.id, config.temperature, config.topk)
    labels = cached_teacher(StoredTargets(folder / key_name(key), key))
    return Distillation(labels, config.distill_weight, config.temperature)


def _wanted(
    config: FinetuneConfig, teacher: RefTeacher, alignment: Sequence[Example]
) -> tuple[ChatFormat, list[TokenizedExample], dict[str, str]]:
    chat = ChatFormat(load_tokenizer(config.base), config.enable_thinking)
    rows, _ = alignment_rows(chat, alignment, config.longest_row(context_of(config.base)))
    return chat, rows, alignment_key(rows, teacher.id, config.temperature, config.topk)
