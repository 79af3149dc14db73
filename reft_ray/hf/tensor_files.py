"""Tensors by name in safetensors files: the only form in which this project writes or reads tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file; shared memory between tensors is copied apart."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a file onto the CPU."""
    return load_file(path)
