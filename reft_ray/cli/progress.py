"""Progress bars with the remaining time on a terminal, lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar:
    """One bar, updated by a run's metrics."""

    def __init__(self, progress: Progress, task: TaskID, name: str, lines: bool) -> None:
        self._progress, self._task, self._name = progress, task, name
        self._lines = lines
        self._next_line = 0.0

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Move to `metrics["progress"]` and show the loss."""
        share = float(metrics["progress"])
        loss = metrics.get("loss", metrics.get("total"))
        note = f"loss {loss:.3f}" if loss is not None else ""
        self._progress.update(self._task, completed=share, note=note)
        if message := metrics.get("note"):
            self._progress.console.print(f"note: {message}", markup=False, highlight=False, soft_wrap=True)
        # Without a terminal: a line every ten seconds.
        if self._lines and (time.monotonic() >= self._next_line or share >= 1.0):
            self._next_line = time.monotonic() + 10.0
            print(f"{self._name}: {share:.0%} {note}", file=sys.stderr, flush=True)


@contextmanager
def bar(name: str, quiet: bool = False) -> Iterator[Bar]:
    """A bar on stderr; hidden if quiet."""
    console = Console(stderr=True, quiet=quiet)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as progress:
        yield Bar(progress, progress.add_task(name, total=1.0, note=""), name, not quiet and not console.is_terminal)
