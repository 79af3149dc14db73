"""Several forward passes at a time, each on one thread: for models too small to keep all threads busy together.

The threads of one pass wait for each other behind every operator. Where a matrix product takes a fraction of a
millisecond, or where other processes take a processor away now and then, that waiting costs more than it brings;
passes that do not wait for each other lose nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_HELP = 1.5
_REPEATS = 5
_ENOUGH_SECONDS = 1.0


def compute_pool(count: int, threads: int) -> ThreadPoolExecutor:
    """A pool of `count` threads that compute on `threads` processors each; other threads keep the number they have."""
    others = torch.get_num_threads()
    started = Barrier(count)

    def take_share() -> None:
        torch.set_num_threads(threads)
        # Asked once, it stays: a thread takes the number over where it first computes, and by then it may be another.
        torch.get_num_threads()
        started.wait()

    pool = ThreadPoolExecutor(count, thread_name_prefix="lane", initializer=take_share)
    list(pool.map(int, range(count)))
    # What a thread sets for itself is also what threads that come later begin with.
    torch.set_num_threads(others)
    return pool


class ParallelPasses:
    """So many threads that run one pass each at a time; they end with this object."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = compute_pool(count, 1)

    def map(self, run: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Results in order; the first error is raised."""
        return self._pool.map(run, items)


def parallel_passes_if_faster(run: Callable[[], object]) -> ParallelPasses | None:
    """As many lanes as threads, where the threads together run a short pass not even 1.5 times as fast as one alone.

    None where they do, or where there is one thread. `run` is the pass, called on this thread and on a lane.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return None
    together = _best_seconds(run)
    lanes = ParallelPasses(threads)
    alone = next(lanes.map(_best_seconds, [run]))
    return lanes if alone < _HELP * together else None


def _best_seconds(run: Callable[[], object]) -> float:
    """The fastest of a few runs; of a single one where that takes long."""
    seconds: list[float] = []
    while len(seconds) < _REPEATS and sum(seconds) < _ENOUGH_SECONDS:
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
