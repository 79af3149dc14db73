"""Two ranks of one gloo group in two processes, as the tests of sharding use them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from reft_ray.finetuning.export import EXPORT
from reft_ray.finetuning.runtime import LocalRuntime

PATIENCE = timedelta(seconds=120)
"""A rank that waits longer for the other, as when they run unequally many passes, fails."""


class GlooRuntime(LocalRuntime):
    """A rank of a gloo group; checkpoints of all ranks go to one folder."""

    def __init__(self, folder: Path, stop_after: int | None = None) -> None:
        super().__init__(folder)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.stop_after = stop_after
        self.steps = 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        moved = tensor.clone()
        dist.all_reduce(moved)
        return moved

    def stop_asked(self) -> bool:
        self.steps += 1
        return self.steps == self.stop_after

    def report(self, metrics: Mapping[str, Any], write: Any = None) -> None:
        if write is not None:
            folder = self.folder / f"checkpoint-{metrics['step']:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            write(folder)
            dist.barrier()


def join(rank: int, world: int, meeting: Path) -> None:
    """Make this process a rank of a group that meets at a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=PATIENCE)


def newest(folder: Path) -> Path:
    return max(folder.glob("checkpoint-*"))


def weights_of(checkpoint: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint's export, whichever its folders."""
    found: dict[str, Tensor] = {}
    for file in sorted((checkpoint / EXPORT).rglob("*.safetensors")):
        found |= load_file(file)
    return found
