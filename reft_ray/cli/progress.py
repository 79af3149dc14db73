"""What a command does now, how much of it is done and about how long it still takes: bars, or lines in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

LINE_SECONDS = 10.0
"""Without a terminal there is a line this often at most."""
TICK_SECONDS = 1.0


class Bar:
    """The present phase of a command; each has a bar of its own, or lines where there is no terminal.

    The estimate of the time left is the phase's mean speed since it began, so it settles as the phase proceeds.
    """

    _share: float

    def __init__(self, progress: Progress, name: str, lines: bool) -> None:
        self._progress, self._lines = progress, lines
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._next_line = time.monotonic() + LINE_SECONDS
        self._begin(name, 0.0)

    def phase(self, name: str, share: float = 0.0, note: str = "") -> None:
        """Begin a phase, or move it to `share`; the one before it is done."""
        with self._lock:
            if name != self._name:
                self._done()
                self._begin(name, share)
            if share != self._share:
                self._moved = time.monotonic()
            self._share, self._note = share, note
            self._draw()

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Move the present phase to `metrics["progress"]`, with what is known of it."""
        loss = metrics.get("loss", metrics.get("total"))
        note = f"loss {loss:.3f}" if loss is not None else ""
        if stage := metrics.get("stage"):
            note = f"{stage} {metrics['prompts_done']} of {metrics['prompts']}"
        self.note(metrics)
        self.phase(self._name, float(metrics["progress"]), note)

    def note(self, metrics: Mapping[str, Any]) -> None:
        """Print the note of a report, such as the rows that were left out."""
        if message := metrics.get("note"):
            self._progress.console.print(f"note: {message}", markup=False, highlight=False, soft_wrap=True)

    def end(self, finished: bool) -> None:
        """End the last phase, which is done unless it failed."""
        with self._lock:
            self._ended.set()
            if finished:
                self._done()

    def tick(self) -> None:
        """Print lines until the end, also while nothing is reported."""
        while not self._ended.wait(TICK_SECONDS):
            with self._lock:
                self._draw()

    def _begin(self, name: str, share: float) -> None:
        self._name, self._share, self._first, self._note = name, share, share, ""
        self._started = self._moved = time.monotonic()
        self._task = self._progress.add_task(name, total=1.0, note="")

    def _draw(self) -> None:
        text = ", ".join(part for part in (self._note, self._left()) if part)
        self._progress.update(self._task, completed=self._share, note=text)
        if self._lines and not self._ended.is_set() and time.monotonic() >= self._next_line:
            share = f"{self._share:.0%}" if self._share else duration(time.monotonic() - self._started)
            self._print(", ".join(part for part in (share, text) if part))

    def _left(self) -> str:
        done = self._share - self._first
        if done <= 0 or self._share >= 1:
            return ""
        left = (self._moved - self._started) / done * (1 - self._share)
        # Counted down until the next report; one that is late does not make it nothing.
        return f"about {duration(max(left - (time.monotonic() - self._moved), left / 10))} left"

    def _done(self) -> None:
        self._progress.update(self._task, completed=1.0, note=self._note)
        self._progress.stop_task(self._task)
        if self._lines:
            took = f"done in {duration(time.monotonic() - self._started)}"
            self._print(", ".join(part for part in (took, self._note) if part))

    def _print(self, text: str) -> None:
        self._next_line = time.monotonic() + LINE_SECONDS
        print(f"{self._name}: {text}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def bar(name: str, quiet: bool = False) -> Iterator[Bar]:
    """Follow a command on stderr from its first phase, `name`; nothing is shown if quiet."""
    console = Console(stderr=True, quiet=quiet)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as progress:
        shown = Bar(progress, name, lines=not quiet and not console.is_terminal)
        ticker = threading.Thread(target=shown.tick, name="progress", daemon=True)
        ticker.start()
        finished = False
        try:
            yield shown
            finished = True
        finally:
            shown.end(finished)
            ticker.join()
