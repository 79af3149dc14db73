"""Soft labels of a run: made once per teacher, alignment set, temperature and K, then shared by all jobs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

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
) -> Path:
    """The file of soft labels in `folder`, computed now if it is not there yet."""
    chat = ChatFormat(load_tokenizer(config.base))
    rows, _ = alignment_rows(chat, alignment, config.longest_row(context_of(config.base)))
    key = alignment_key(rows, teacher.id, config.temperature, config.topk)
    path = folder / key_name(key)
    if not path.is_file():
        model = teacher.standalone(teacher.base(config.base, device=str(device)))
        write_soft_targets(path, ModelForward(model), rows, key, chat.pad_id, config.micro_batch_tokens, device)
    return path
