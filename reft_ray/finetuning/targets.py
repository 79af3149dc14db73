"""Soft labels of a run: made once per teacher, alignment set, temperature and K, then shared by all jobs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from reft_ray.core.batch import TokenizedExample
from reft_ray.core.conversation import Example
from reft_ray.finetuning.config import FinetuneConfig
from reft_ray.finetuning.encoding import alignment_rows
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.forward import ModelForward
from reft_ray.hf.loading import context_of, load_tokenizer
from reft_ray.hf.ref_teacher import RefTeacher
from reft_ray.hf.soft_targets import alignment_key, key_name, write_soft_targets


def ensure_soft_targets(
    config: FinetuneConfig,
    teacher: RefTeacher,
    alignment: Sequence[Example],
    folder: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """The file of soft labels in `folder`, computed now if it is not there yet."""
    chat, rows, key = _wanted(config, teacher, alignment)
    path = folder / key_name(key)
    if not path.is_file():
        model = teacher.standalone(teacher.base(config.base, dtype, str(device)))
        write_soft_targets(path, ModelForward(model), rows, key, chat.pad_id, config.micro_batch_tokens, device)
    return path


def soft_targets_path(config: FinetuneConfig, teacher: RefTeacher, alignment: Sequence[Example], folder: Path) -> Path:
    """Where that file lies, whether it is there or not; loads a tokenizer and no model."""
    return folder / key_name(_wanted(config, teacher, alignment)[2])


def soft_targets_on_worker(
    config: FinetuneConfig, teacher: RefTeacher, alignment: Sequence[Example], folder: Path, gpu: bool
) -> Path:
    """The file, computed on this machine's accelerator in bfloat16, as frozen weights are there."""
    device = "cuda" if gpu and torch.cuda.is_available() else "cpu"
    narrow = device == "cuda" and config.precision != "float32"
    return ensure_soft_targets(config, teacher, alignment, folder, device, torch.bfloat16 if narrow else torch.float32)


def _wanted(
    config: FinetuneConfig, teacher: RefTeacher, alignment: Sequence[Example]
) -> tuple[ChatFormat, list[TokenizedExample], dict[str, str]]:
    chat = ChatFormat(load_tokenizer(config.base))
    rows, _ = alignment_rows(chat, alignment, config.longest_row(context_of(config.base)))
    return chat, rows, alignment_key(rows, teacher.id, config.temperature, config.topk)
