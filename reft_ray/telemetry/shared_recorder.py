"""Record in processes that may exit at any time, such as job drivers and screening actors.

Ray's agents do not collect from a process that has exited, so its last few seconds of counts would be lost. Here counts
and observations are sent to a detached actor. Gauges stay in the process and disappear with it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from threading import Event, Lock, Thread

import ray
from ray.exceptions import RayError

from reft_ray.local_ray import join_ray
from reft_ray.telemetry.catalog import METRICS
from reft_ray.telemetry.metric_types import DEFAULT_APPLICATION, Kind, Labeller, Metric, check_value
from reft_ray.telemetry.ray_recorder import RayRecorder
from reft_ray.telemetry.recorder import NullRecorder, Recorder

logger = logging.getLogger(__name__)

SEND_SECONDS = 2.0
ACTOR_NAME = "reft-recorder"
NAMESPACE = "reft"
_TIMEOUT_SECONDS = 30.0
_METRICS = {metric.name: metric for metric in METRICS}

# Metric, value and labels of one count or observation.
Call = tuple[str, float, dict[str, str]]


@ray.remote(num_cpus=0, max_restarts=-1)
class RecorderActor:
    """Records the counts and observations of other processes; one per cluster and application."""

    def __init__(self, application: str) -> None:
        self._recorder = RayRecorder(Labeller(application))

    def record(self, calls: Sequence[Call]) -> None:
        """Record counts and observations."""
        for name, value, labels in calls:
            metric = _METRICS[name]
            record = self._recorder.count if metric.kind is Kind.COUNTER else self._recorder.observe
            record(metric, value, **labels)


class SharedRecorder:
    """A Recorder whose counts outlive the process; they are safe once `flush` returns."""

    def __init__(self, application: str = DEFAULT_APPLICATION) -> None:
        self._gauges = RayRecorder(Labeller(application))
        self._actor = RecorderActor.options(  # type: ignore[attr-defined]
            name=f"{ACTOR_NAME}-{application}", namespace=NAMESPACE, lifetime="detached", get_if_exists=True
        ).remote(application)
        self._calls: list[Call] = []
        self._lock, self._sending = Lock(), Lock()
        self._closed = Event()
        self._sender = Thread(target=self._send, name="reft-counts", daemon=True)
        self._sender.start()

    @property
    def application(self) -> str:
        return self._gauges.application

    def count(self, metric: Metric, value: float = 1, /, **labels: str) -> None:
        self._add(metric, Kind.COUNTER, value, labels)

    def observe(self, metric: Metric, value: float, /, **labels: str) -> None:
        self._add(metric, Kind.HISTOGRAM, value, labels)

    def set(self, metric: Metric, value: float | None, /, **labels: str) -> None:
        self._gauges.set(metric, value, **labels)

    def flush(self) -> None:
        """Send all recorded values and wait until they have arrived. If the cluster is gone, log a warning."""
        with self._sending:
            with self._lock:
                calls, self._calls = self._calls, []
            if not calls:
                return
            try:
                ray.get(self._actor.record.remote(calls), timeout=_TIMEOUT_SECONDS)
            except RayError as error:
                logger.warning("lost %d counts and observations: %s", len(calls), type(error).__name__)

    def close(self) -> None:
        """Flush and stop refreshing gauges, which then disappear."""
        self._closed.set()
        self._sender.join()
        self.flush()
        self._gauges.close()

    def _add(self, metric: Metric, kind: Kind, value: float, labels: dict[str, str]) -> None:
        metric.check(kind, labels)
        check_value(metric, value)
        with self._lock:
            self._calls.append((metric.name, value, {name: str(label) for name, label in labels.items()}))

    def _send(self) -> None:
        while not self._closed.wait(SEND_SECONDS):
            self.flush()


def recorder_from_environment(application: str = DEFAULT_APPLICATION) -> Recorder:
    """Connect to the cluster in RAY_ADDRESS and return its recorder; a NullRecorder without RAY_ADDRESS.

    If the connection fails, log a warning and return a NullRecorder: missing metrics must not stop the work.
    """
    try:
        joined = join_ray()
    except (OSError, RuntimeError) as error:
        logger.warning("no metrics are recorded: cannot connect to RAY_ADDRESS (%s)", type(error).__name__)
        return NullRecorder()
    return SharedRecorder(application) if joined else NullRecorder()
