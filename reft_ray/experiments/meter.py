"""Measure the cost of a block: seconds, the process's peak memory and, on request, floating-point operations."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

_MIB = 1 << 20


@dataclass(slots=True)
class Cost:
    """Set when the block ends. `peak_mib` is the peak of the process or, on an accelerator, of the allocator; `flops`
    counts forward and backward, 0 if they were not counted.
    """

    seconds: float = 0.0
    peak_mib: float = 0.0
    flops: int = 0


@contextmanager
def metered(count_flops: bool = False, device: str = "cpu") -> Iterator[Cost]:
    """Measure the block. Counting operations slows small models down, which `seconds` then includes."""
    cost = Cost()
    counter = FlopCounterMode(display=False) if count_flops else None
    _reset_peak(device)
    started = time.perf_counter()
    with counter or nullcontext():
        yield cost
    if device == "cuda":
        torch.cuda.synchronize()
    cost.seconds = time.perf_counter() - started
    cost.peak_mib = _peak(device) / _MIB
    cost.flops = counter.get_total_flops() if counter else 0


def _reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    gc.collect()
    if sys.platform == "linux":
        # Return freed memory first: it would count as memory of this block.
        ctypes.CDLL(None).malloc_trim(0)
    # Linux resets a process's high-water mark on request; elsewhere the peak is that of the process so far.
    marker = Path("/proc/self/clear_refs")
    if marker.exists():
        marker.write_text("5")


def _peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
