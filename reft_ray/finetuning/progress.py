"""Metrics of a running worker group, brought to the process that started it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from ray.util.queue import Empty, Full, Queue

from reft_ray.finetuning.runtime import Progress

_WAIT_SECONDS = 0.2


class Channel:
    """A bounded queue from rank 0 to a callback in this process; losing a metric never stops a run."""

    def __init__(self, progress: Progress) -> None:
        self.queue = Queue(maxsize=1000, actor_options={"num_cpus": 0})
        self._progress = progress
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._drain, name="progress", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join()
        self.queue.shutdown(force=True)

    def _drain(self) -> None:
        while not (self._closed.is_set() and self.queue.empty()):
            with contextlib.suppress(Empty):
                self._progress(self.queue.get(timeout=_WAIT_SECONDS))


class Sender:
    """The worker's end: a `Progress` that never blocks training."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    def __call__(self, metrics: Mapping[str, Any]) -> None:
        """Put metrics on the queue, or drop them where nobody drains it."""
        with contextlib.suppress(Full):
            self._queue.put_nowait(dict(metrics))
