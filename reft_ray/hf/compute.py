"""How a process computes: device, number format, memory, and forward passes in parallel."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from threading import Barrier
from typing import Literal, TypeVar

import torch

from reft_ray.core.errors import UsageError
from reft_ray.hf.machine import available_cpus

Item = TypeVar("Item")
Result = TypeVar("Result")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_MIB = 1 << 20
_MIN_THREAD_SPEEDUP = 1.5
_REPEATS = 5
_MAX_SECONDS = 1.0


def default_device() -> str:
    """The device where none is configured: CUDA if there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_dtype(precision: str, device: torch.device | str) -> torch.dtype:
    """`float32`, `bfloat16`, or `auto`: bfloat16 if a matrix product is at least 1.3 times as fast with it.

    Raises UsageError for any other name.
    """
    if precision == "auto":
        precision = faster_precision(str(device))
    if precision not in _DTYPES:
        raise UsageError(f"precision {precision}: one of auto, {', '.join(_DTYPES)}")
    return _DTYPES[precision]


def faster_precision(device: str) -> Literal["bfloat16", "float32"]:
    """The name of the precision that `auto` is on a device."""
    return "bfloat16" if bfloat16_is_faster(device) else "float32"


@lru_cache
def bfloat16_is_faster(device: str) -> bool:
    """Whether bfloat16 beats float32 by 1.3 on a 1024 x 1024 product; measured once per process and device.

    A CPU that has no instructions for bfloat16 needs many seconds for it, so a small product is tried first.
    """
    return all(
        matmul_rate(torch.float32, device, size) * factor < matmul_rate(torch.bfloat16, device, size)
        for size, factor in ((128, 0.5), (1024, 1.3))
    )


def matmul_rate(dtype: torch.dtype, device: str, size: int = 1024, repeats: int = 5) -> float:
    """The best of several measured rates of a square matrix product, in FLOP/s."""
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


def keep_freed_memory() -> None:
    """Let the C library of this process keep up to 256 MiB of memory that tensors have freed.

    By default glibc returns freed memory soon, and the next operator faults it in again page by page: a twentieth of
    the time of a small model on a CPU. No effect with other C libraries.
    """
    with suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_TRIM_THRESHOLD, 256 * _MIB)
        mallopt(_MMAP_THRESHOLD, 32 * _MIB)


def compute_pool(count: int, threads: int) -> ThreadPoolExecutor:
    """A pool of `count` threads that compute with `threads` torch threads each; other threads keep their number."""
    default = torch.get_num_threads()
    started = Barrier(count)

    def set_threads() -> None:
        torch.set_num_threads(threads)
        # A thread adopts the number when it first asks for it, and by then the global number may have changed.
        torch.get_num_threads()
        started.wait()

    pool = ThreadPoolExecutor(count, thread_name_prefix="compute", initializer=set_threads)
    list(pool.map(int, range(count)))
    # What a thread sets for itself is also the default of threads that are created later.
    torch.set_num_threads(default)
    return pool


class ParallelPasses:
    """Runs up to `count` forward passes at a time, each on one thread: for models too small to use all threads well.

    The threads of one pass wait for each other after every operator. Where a matrix product takes a fraction of a
    millisecond, or other processes compete for the CPU, that waiting costs more than the threads bring.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = compute_pool(count, 1)

    def map(self, run: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Results in order; the first error is raised."""
        return self._pool.map(run, items)


def parallel_passes_if_faster(run: Callable[[], object]) -> ParallelPasses | None:
    """One pass per thread, unless all threads together run a pass at least 1.5 times as fast as one thread does.

    None in that case, and if torch has only one thread. `run` is the pass; it is timed on this thread and on a pool's.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return None
    all_threads = _best_seconds(run)
    passes = ParallelPasses(threads)
    one_thread = next(passes.map(_best_seconds, [run]))
    return passes if one_thread < _MIN_THREAD_SPEEDUP * all_threads else None


def use_threads(cpus: float | None = None) -> None:
    """Compute with a thread per CPU: with `cpus` of them, or with all that this process may use.

    OMP_NUM_THREADS, which Ray and users set, replaces all.
    """
    if cpus is not None:
        torch.set_num_threads(max(1, min(int(cpus), available_cpus())))
    elif not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(available_cpus())


def keep_faster_threads(run: Callable[[], object], earlier: int = 0) -> int:
    """Compute with one thread if all of them together run `run` no faster; returns the number in effect.

    Where other processes have the CPUs, the threads of a team wait for each other at every operator. `earlier` is the
    number that was chosen before, which is kept without measuring, so that a resumed run computes the same sums.
    """
    threads = torch.get_num_threads()
    if earlier or threads == 1:
        torch.set_num_threads(min(earlier or threads, threads))
        return torch.get_num_threads()
    run()
    all_threads = _best_seconds(run)
    torch.set_num_threads(1)
    if all_threads < _best_seconds(run):
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def _best_seconds(run: Callable[[], object]) -> float:
    """The fastest of a few runs, or of as many as start within a second."""
    seconds: list[float] = []
    while len(seconds) < _REPEATS and sum(seconds) < _MAX_SECONDS:
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
