"""What this process may use of its machine: processors, free memory, and a micro-batch that fits into it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from math import ceil
from pathlib import Path

import torch
from torch import nn

_GIB = 1 << 30
_UNKNOWN_MEMORY = 4 * _GIB
_CPU_SHARE, _GPU_SHARE = 0.5, 0.6
_CPU_LIMIT = 0.75 * _GIB
"""On a CPU larger micro-batches are hardly faster; SmolLM2 (256 tokens) stays below 2.5 GB with them."""
_ALLOCATOR = 1.5
"""Measured on SmolLM2: the process grows by this factor over what autograd keeps."""
_LOGIT_COPIES = 3
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


def token_bytes(model: nn.Module, trained: bool = True) -> int:
    """About how many bytes one token of a micro-batch takes: activations kept for backward, and its logits.

    Counted for a decoder with adapters on all linear layers: per layer nine tensors of the hidden width (norms,
    queries, keys, values, attention) and four of the inner width. Attention itself is taken to be linear in tokens.
    """
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    width = int(config.hidden_size)
    inner = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None) or 4 * width
    inner = max(inner) if isinstance(inner, (list, tuple)) else inner
    inner *= getattr(config, "num_experts_per_tok", None) or 1
    kept = int(config.num_hidden_layers) * (9 * width + 4 * int(inner)) * 4 if trained else 0
    return int(_ALLOCATOR * kept) + _LOGIT_COPIES * int(config.vocab_size) * 4


def tokens_that_fit(model: nn.Module, device: torch.device | str = "cpu", ranks: int = 1) -> int:
    """The tokens of a micro-batch that fit into free memory; a multiple of 64, at most `MOST_TOKENS`.

    `model` is loaded; its gradients and optimiser state come later. `ranks` share the memory of a CPU.
    """
    learned = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    free = free_memory(device) - 12 * learned
    cpu = torch.device(device).type == "cpu"
    budget = min(free * _CPU_SHARE / ranks, _CPU_LIMIT) if cpu else free * _GPU_SHARE
    return max(_STEP, min(MOST_TOKENS, int(budget / token_bytes(model)) // _STEP * _STEP))
