"""Which number format a device computes fastest in: measured on it, not guessed from its name."""

from __future__ import annotations

import time
from functools import lru_cache

import torch

from reft_ray.core.errors import UsageError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def best_device() -> str:
    """The device to compute on where none is named."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_dtype(precision: str, device: torch.device | str) -> torch.dtype:
    """`float32`, `bfloat16`, or `auto`: bfloat16 where a matrix product is at least 1.3 times as fast with it.

    Raises UsageError for any other name.
    """
    if precision == "auto":
        return torch.bfloat16 if bfloat16_pays(str(device)) else torch.float32
    if precision not in _DTYPES:
        raise UsageError(f"precision {precision}: one of auto, {', '.join(_DTYPES)}")
    return _DTYPES[precision]


@lru_cache
def bfloat16_pays(device: str) -> bool:
    """Whether bfloat16 beats float32 by 1.3 on a 1024 x 1024 product; measured once per process and device."""
    return matmul_rate(torch.float32, device) * 1.3 < matmul_rate(torch.bfloat16, device)


def matmul_rate(dtype: torch.dtype, device: str, size: int = 1024, repeats: int = 5) -> float:
    """Best of several measured rates of a square matrix product, in FLOP/s."""
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(repeats + 1):
        _synchronize(device)
        start = time.perf_counter()
        a @ b
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
