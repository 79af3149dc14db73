"""Metrics from a running worker group to the process that started it, and the request to stop the other way."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import ray
from ray.exceptions import ActorUnavailableError, RayError
from ray.util.queue import Empty, Full, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from reft_ray.finetuning.runtime import Phase, Progress, Stop, no_phase

_WAIT_SECONDS = 0.2

logger = logging.getLogger(__name__)


class _Flag:
    """A flag in an actor: set once, read by any process."""

    def __init__(self) -> None:
        self._raised = False

    def set(self) -> None:
        self._raised = True

    def is_set(self) -> bool:
        return self._raised


class Channel:
    """A bounded queue from rank 0 to callbacks in this process; losing a metric, or the queue, never stops a run.

    With `stop`, this process polls it and sets a flag that rank 0 reads.
    """

    def __init__(self, progress: Progress | None, stop: Stop | None = None, phase: Phase = no_phase) -> None:
        # On this host: they are lost with this process, and with no other.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": here}
        self.queue = Queue(maxsize=1000, actor_options=options)
        self.flag: Any = ray.remote(_Flag).options(**options).remote() if stop else None
        self._progress = progress
        self._stop = stop
        self._phase = phase
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
        try:
            self._pass_on()
        except RayError:
            logger.warning("the progress of this run is no longer shown: its queue is lost")

    def _pass_on(self) -> None:
        while not (self._closed.is_set() and self.queue.empty()):
            if self.flag is not None and self._stop is not None and self._stop():
                self.flag.set.remote()
                self._stop = None
            with contextlib.suppress(Empty, ActorUnavailableError):
                metrics = self.queue.get(timeout=_WAIT_SECONDS)
                if isinstance(metrics, tuple):
                    self._phase(*metrics)
                elif self._progress is not None:
                    self._progress(metrics)


class Sender:
    """The worker's end: a `Progress` that never blocks training, and a `Stop`."""

    def __init__(self, queue: Queue, flag: Any = None) -> None:
        self._queue = queue
        self._flag = flag

    def __call__(self, metrics: Mapping[str, Any]) -> None:
        """Put metrics on the queue, or drop them if it is full or lost."""
        with contextlib.suppress(Full, RayError):
            self._queue.put_nowait(dict(metrics))

    def phase(self, name: str, share: float, note: str) -> None:
        """Put what the run does on the queue, or drop it if it is full or lost."""
        with contextlib.suppress(Full, RayError):
            self._queue.put_nowait((name, share, note))

    def stop_asked(self) -> bool:
        """Whether the process that started the run asks it to stop; False once nothing can ask."""
        with contextlib.suppress(RayError):
            return self._flag is not None and bool(ray.get(self._flag.is_set.remote()))
        return False

    @property
    def stoppable(self) -> bool:
        """Whether a stop can be requested at all."""
        return self._flag is not None
