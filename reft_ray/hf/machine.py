"""What this process may use of its machine: processors, free memory, and a micro-batch that fits into it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from math import ceil
from pathlib import Path

import torch
from torch import nn

_GIB = 1 << 30
_UNKNOWN_MEMORY = 4 * _GIB
_CPU_SHARE, _GPU_SHARE = 0.5, 0.75
_GPU_LOSS = 3 * _GIB
"""For the part of the logits that a loss computes at a time, several times in float32."""
_CPU_LIMIT = 0.75 * _GIB
"""On a CPU larger micro-batches are hardly faster; SmolLM2 (256 tokens) stays below 2.5 GB with them."""
_ALLOCATOR = 1.5
"""Measured on SmolLM2: the process grows by this factor over what autograd keeps."""
_STEP = 64
MOST_TOKENS = 8192


def available_cpus(root: Path = Path("/")) -> int:
    """The processors that the scheduler and the control group leave to this process; at least one."""
    found = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for folder in _control_groups("cpu", root):
        with suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()
            found = min(found, float(quota) / float(period))
        with suppress(OSError, ValueError):
            quota = (folder / "cpu.cfs_quota_us").read_text()
            if float(quota) > 0:
                found = min(found, float(quota) / float((folder / "cpu.cfs_period_us").read_text()))
    return max(1, ceil(found))


def free_memory(device: torch.device | str = "cpu", root: Path = Path("/")) -> int:
    """Bytes that this process may still take: of the accelerator, or of the machine within its control group."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found: list[int] = []
    with suppress(OSError, StopIteration, ValueError):
        lines = (root / "proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    for folder in _control_groups("memory", root):
        for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            # Without a limit the file says "max", or a number larger than any machine.
            with suppress(OSError, ValueError):
                left = int((folder / limit).read_text()) - int((folder / usage).read_text())
                found.append(left + _reclaimable(folder))
    return max(0, min(found, default=_UNKNOWN_MEMORY))


def _reclaimable(folder: Path) -> int:
    """Bytes of a control group's page cache that the kernel gives up first."""
    for line in (folder / "memory.stat").read_text().splitlines():
        name, value = line.split()
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def _control_groups(controller: str, root: Path) -> Iterator[Path]:
    """The control group of this process and those above it, in either version of the interface."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, names, path = line.split(":", 2)
            if names and controller not in names.split(","):
                continue
            top = root / "sys/fs/cgroup" / (controller if names else "")
            folder = top / path.lstrip("/")
            yield from (part for part in (folder, *folder.parents) if part.is_relative_to(top))


def token_bytes(model: nn.Module, recomputed: bool = False) -> int:
    """About how many bytes one token of a training pass takes: the activations that are kept for its backward pass.

    Counted for a decoder with adapters on all linear layers from the lowest trained one: per layer nine tensors of the
    hidden width (norms, queries, keys, values, attention) and four of the inner width, in the base's precision;
    `recomputed`: the layer's input alone. Attention itself is taken to be linear in tokens, and logits are computed in
    parts (`core.losses`).
    """
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    width, layers = int(config.hidden_size), int(config.num_hidden_layers) - _lowest_trained(model)
    inner = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None) or 4 * width
    inner = max(inner) if isinstance(inner, (list, tuple)) else inner
    inner *= getattr(config, "num_experts_per_tok", None) or 1
    layer = 9 * width + 4 * int(inner)
    size = min(p.element_size() for p in model.parameters() if p.is_floating_point())
    # While a layer is computed again, its gradients are there too.
    return int(_ALLOCATOR * size * (layers * width + 2 * layer if recomputed else layers * layer))


def _lowest_trained(model: nn.Module) -> int:
    """The lowest decoder layer with a trained weight, from 0; 0 also where weights outside the layers are trained."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return min((layer_of(name) or 0 for name in names), default=0)


def layer_of(name: str) -> int | None:
    """The decoder layer, from 0, in the full name of a module or parameter; None outside the layers."""
    number = re.search(r"\.(\d+)\.", name)
    return int(number[1]) if number else None


def tokens_that_fit(model: nn.Module, device: torch.device | str = "cpu", ranks: int = 1) -> int:
    """The tokens of a micro-batch that fit into free memory; a multiple of 64, at most `MOST_TOKENS`.

    Where activations of half of those do not fit on a GPU, they are taken to be computed again (`tokens_kept`).
    """
    kept = tokens_kept(model, device, ranks)
    if torch.device(device).type == "cpu" or kept >= MOST_TOKENS // 2:
        return min(MOST_TOKENS, kept)
    return _fitting(_budget(model, device, ranks) / token_bytes(model, recomputed=True))


def tokens_kept(model: nn.Module, device: torch.device | str = "cpu", ranks: int = 1) -> int:
    """The tokens of a pass whose activations fit into free memory; a longer one has to compute them again.

    `model` is loaded; its gradients and optimiser state come later. `ranks` share the memory of a CPU.
    """
    return _fitting(_budget(model, device, ranks) / token_bytes(model))


def _fitting(tokens: float) -> int:
    return max(_STEP, min(MOST_TOKENS, int(tokens) // _STEP * _STEP))


def _budget(model: nn.Module, device: torch.device | str, ranks: int) -> float:
    learned = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    free = free_memory(device) - 12 * learned
    if torch.device(device).type == "cpu":
        return min(free * _CPU_SHARE / ranks, _CPU_LIMIT)
    return free * _GPU_SHARE - _GPU_LOSS
