"""The stages of a long command: what runs now, and an estimate of the time left that learns from this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock
from typing import Any

Show = Callable[[str, float, float], None]
"""(stage, share of the whole done, seconds left)."""


class Stages:
    """Stages with their usual shares of the work; the pace so far scales what is left. Several may run at a time.

    `usual` gives what each stage once added to the whole in seconds; only their ratios matter after the first stage.
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
        """Time one stage; yields a callback for metrics that hold `progress` in [0, 1]."""
        started = time.perf_counter()

        def update(metrics: Mapping[str, Any]) -> None:
            self._tell(name, float(metrics["progress"]))

        update({"progress": 0.0})
        yield update
        self._seconds[name] = time.perf_counter() - started
        update({"progress": 1.0})

    @property
    def seconds(self) -> dict[str, float]:
        """What each finished stage took, in the order of the usual ones."""
        return {name: self._seconds[name] for name in self._usual if name in self._seconds}

    @property
    def seconds_total(self) -> float:
        """Since the first stage began."""
        return time.perf_counter() - self._started

    def _tell(self, name: str, progress: float) -> None:
        with self._lock:
            self._progress[name] = progress
            passed = sum(self._usual[stage] * share for stage, share in self._progress.items())
            whole = sum(self._usual.values())
            # Start-up hides in the first seconds of a stage: the pace is taken once some of it is done.
            if progress > 0.1:
                self._pace = self.seconds_total / passed
            self._show(name, passed / whole, (whole - passed) * self._pace)
