"""A finetuned student as a model that answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from reft_ray.hf.loading import Base, load_base
from reft_ray.hf.lora import ADAPTER_WEIGHTS, attach_saved, merge


def load_student(base: str, student: Path | None, device: str) -> Base:
    """The base, the base with a student's adapter merged in, or a student with whole weights; bfloat16 on CUDA."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    if student is not None and not (student / ADAPTER_WEIGHTS).is_file():
        return load_base(str(student), dtype, device)
    loaded = load_base(base, dtype, device)
    return replace(loaded, model=merge(attach_saved(loaded.model, "student", student))) if student else loaded
