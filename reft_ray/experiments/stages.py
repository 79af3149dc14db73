"""The stages of a long command: what runs now, and an estimate of the time left that learns from this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

Show = Callable[[str, float, float], None]
"""(stage, share of the whole done, seconds left)."""


class Stages:
    """Stages with their usual shares of the work; what they took so far scales what is left.

    `usual` gives seconds per stage as they were measured once; only their ratios matter after the first stage.
    """

    def __init__(self, usual: Mapping[str, float], show: Show) -> None:
        self._usual = dict(usual)
        self._show = show
        self._done: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[Mapping[str, Any]], None]]:
        """Time one stage; yields a callback for metrics that hold `progress` in [0, 1]."""
        started = time.perf_counter()

        def update(metrics: Mapping[str, Any]) -> None:
            self._tell(name, float(metrics["progress"]), time.perf_counter() - started)

        update({"progress": 0.0})
        yield update
        self._done[name] = time.perf_counter() - started

    @property
    def seconds(self) -> dict[str, float]:
        """What each finished stage took."""
        return dict(self._done)

    @property
    def seconds_total(self) -> float:
        """Since the first stage began."""
        return time.perf_counter() - self._started

    def _tell(self, name: str, progress: float, elapsed: float) -> None:
        usual = self._usual[name]
        passed = sum(self._usual[done] for done in self._done) + usual * progress
        left = sum(self._usual.values()) - passed
        # Start-up hides in the first seconds of a stage: its own speed counts only once some of it is done.
        spent = sum(self._done.values()) + (elapsed if progress > 0.1 else usual * progress)
        pace = spent / passed if passed > 0 else 1.0
        self._show(name, passed / sum(self._usual.values()), left * pace)
