"""The stages of a long command: the current one, and an estimate of the remaining time at this machine's speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock
from typing import Any

Show = Callable[[str, float, float], None]
"""(stage, share of all work done, seconds left)."""


class Stages:
    """Stages with their usual shares of the work; the speed so far scales the rest. Several can run in parallel.

    `usual` is what each stage once added to the total time in seconds; after the first stage only ratios matter.
    """

    def __init__(self, usual: Mapping[str, float], show: Show) -> None:
        self._usual = dict(usual)
        self._show = show
        self._seconds: dict[str, float] = {}
        self._progress: dict[str, float] = {}
        self._pace = 1.0
        self._lock = Lock()
        self._started = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[Mapping[str, Any]], None]]:
        """Time one stage; yields a callback for metrics with `progress` in [0, 1]."""
        started = time.perf_counter()

        def update(metrics: Mapping[str, Any]) -> None:
            self._report(name, float(metrics["progress"]))

        update({"progress": 0.0})
        yield update
        self._seconds[name] = time.perf_counter() - started
        update({"progress": 1.0})

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds of each finished stage, in the order of `usual`."""
        return {name: self._seconds[name] for name in self._usual if name in self._seconds}

    @property
    def seconds_total(self) -> float:
        """Seconds since the first stage started."""
        return time.perf_counter() - self._started

    def _report(self, name: str, progress: float) -> None:
        with self._lock:
            self._progress[name] = progress
            passed = sum(self._usual[stage] * share for stage, share in self._progress.items())
            whole = sum(self._usual.values())
            # The first seconds of a stage are start-up, so the pace is measured after a tenth of it.
            if progress > 0.1:
                self._pace = self.seconds_total / passed
            self._show(name, passed / whole, (whole - passed) * self._pace)
