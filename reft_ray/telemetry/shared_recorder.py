"""Recording in processes of a cluster that may end at any moment, such as drivers of jobs and screening actors.

Ray's agents fetch nothing from a process that is gone, so what was counted in its last seconds would be lost. Here
counts and observations go to an actor that outlives the process. Gauges stay: they shall vanish with it.
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
KEEPER = "reft-recorder"
NAMESPACE = "reft"
_PATIENCE_SECONDS = 30.0
_METRICS = {metric.name: metric for metric in METRICS}

# Metric, value and labels of one count or observation.
Call = tuple[str, float, dict[str, str]]


@ray.remote(num_cpus=0, max_restarts=-1)
class Keeper:
    """One per cluster and application; its own process is what Ray's agent asks."""

    def __init__(self, application: str) -> None:
        self._recorder = RayRecorder(Labeller(application))

    def record(self, calls: Sequence[Call]) -> None:
        """Count and observe."""
        for name, value, labels in calls:
            metric = _METRICS[name]
            record = self._recorder.count if metric.kind is Kind.COUNTER else self._recorder.observe
            record(metric, value, **labels)


class SharedRecorder:
    """A Recorder whose counts survive its process; `flush` returns once they are safe."""

    def __init__(self, application: str = DEFAULT_APPLICATION) -> None:
        self._gauges = RayRecorder(Labeller(application))
        self._keeper = Keeper.options(  # type: ignore[attr-defined]
            name=f"{KEEPER}-{application}", namespace=NAMESPACE, lifetime="detached", get_if_exists=True
        ).remote(application)
        self._calls: list[Call] = []
        self._lock, self._sending = Lock(), Lock()
        self._closed = Event()
        self._sender = Thread(target=self._send, name="reft-counts", daemon=True)
        self._sender.start()

    @property
    def application(self) -> str:
        """See Recorder."""
        return self._gauges.application

    def count(self, metric: Metric, value: float = 1, /, **labels: str) -> None:
        """See Recorder."""
        self._add(metric, Kind.COUNTER, value, labels)

    def observe(self, metric: Metric, value: float, /, **labels: str) -> None:
        """See Recorder."""
        self._add(metric, Kind.HISTOGRAM, value, labels)

    def set(self, metric: Metric, value: float | None, /, **labels: str) -> None:
        """See Recorder."""
        self._gauges.set(metric, value, **labels)

    def flush(self) -> None:
        """Wait until what was recorded is out of this process. A cluster that is gone is told in the log."""
        with self._sending:
            with self._lock:
                calls, self._calls = self._calls, []
            if not calls:
                return
            try:
                ray.get(self._keeper.record.remote(calls), timeout=_PATIENCE_SECONDS)
            except RayError as error:
                logger.warning("%d counts are lost: %s", len(calls), type(error).__name__)

    def close(self) -> None:
        """Flush, and stop setting gauges again, which then vanish."""
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
    """The recorder of a process beside the cluster in RAY_ADDRESS, which it joins; without one nothing is counted.

    A cluster that cannot be reached is told in the log: what is counted must not stop what is done.
    """
    try:
        there = join_ray()
    except (ConnectionError, RuntimeError, TimeoutError) as error:
        logger.warning("nothing is counted: the cluster of RAY_ADDRESS cannot be joined (%s)", type(error).__name__)
        return NullRecorder()
    return SharedRecorder(application) if there else NullRecorder()
