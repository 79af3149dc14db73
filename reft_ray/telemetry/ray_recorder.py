"""Recording in Ray processes: through `ray.util.metrics`, exposed by each node's agent with the prefix `ray_`.

Ray facts that this file lives with: a gauge vanishes 20 s after its last set, so a thread sets it again; a counter
refuses 0; histogram sums are made of bucket midpoints; series of dead workers stay, so readers sum over WorkerId.
"""

from __future__ import annotations

from collections.abc import Mapping
from threading import Event, Lock, Thread
from typing import Any

from ray.util import metrics as ray_metrics

from reft_ray.telemetry.metric_types import APPLICATION, Kind, Labeller, Metric, Unit, check_value

REFRESH_SECONDS = 5.0
_REMEMBERED = 10_000

# A Counter, Gauge or Histogram, as the kind that was checked says, with the tags of one series.
Child = tuple[Any, dict[str, str]]


class RayRecorder:
    """A Recorder for Ray drivers, actors and replicas; make it in the process that records, it does not travel.

    `close` stops the refreshing of gauges, which then vanish.
    """

    def __init__(self, labeller: Labeller | None = None, refresh_seconds: float = REFRESH_SECONDS) -> None:
        self._labeller = labeller or Labeller()
        self._refresh_seconds = refresh_seconds
        self._families: dict[str, Any] = {}
        self._children: dict[tuple[object, ...], Child] = {}
        self._gauges: dict[str, dict[tuple[str, ...], tuple[Any, dict[str, str], float]]] = {}
        self._lock = Lock()
        self._closed = Event()
        self._refresher: Thread | None = None

    @property
    def application(self) -> str:
        """See Recorder."""
        return self._labeller.application

    def count(self, metric: Metric, value: float = 1, /, **labels: str) -> None:
        """See Recorder."""
        counter, tags = self._child(metric, Kind.COUNTER, labels)
        check_value(metric, value)
        if value:
            counter.inc(value, tags)

    def observe(self, metric: Metric, value: float, /, **labels: str) -> None:
        """See Recorder."""
        histogram, tags = self._child(metric, Kind.HISTOGRAM, labels)
        check_value(metric, value)
        histogram.observe(value, tags)

    def set(self, metric: Metric, value: float | None, /, **labels: str) -> None:
        """See Recorder; a series that is forgotten leaves Ray's exposition 20 s later."""
        gauge, tags = self._child(metric, Kind.GAUGE, labels)
        with self._lock:
            if metric.unit is Unit.INFO:
                self._gauges[metric.name] = {}
            series = self._gauges.setdefault(metric.name, {})
            if value is None:
                series.pop(tuple(tags.values()), None)
                return
            gauge.set(value, tags)
            series[tuple(tags.values())] = (gauge, tags, value)
            if self._refresher is None and not self._closed.is_set():
                self._refresher = Thread(target=self._refresh, name="reft-gauges", daemon=True)
                self._refresher.start()

    def close(self) -> None:
        """Stop setting gauges again; counters and histograms keep working."""
        self._closed.set()
        if self._refresher is not None:
            self._refresher.join()

    def _refresh(self) -> None:
        while not self._closed.wait(self._refresh_seconds):
            with self._lock:
                for series in self._gauges.values():
                    for gauge, tags, value in series.values():
                        gauge.set(value, tags)

    def _child(self, metric: Metric, kind: Kind, labels: Mapping[str, str]) -> Child:
        key = (kind, metric.name, *labels.items())
        child = self._children.get(key)
        if child is None:
            metric.check(kind, labels)
            with self._lock:
                names = (APPLICATION, *metric.label_names)
                tags = dict(zip(names, self._labeller.values(metric, labels), strict=True))
                child = self._family(metric), tags
                if len(self._children) < _REMEMBERED:
                    self._children[key] = child
        return child

    def _family(self, metric: Metric) -> Any:
        if metric.name not in self._families:
            names = (APPLICATION, *metric.label_names)
            if metric.kind is Kind.HISTOGRAM:
                self._families[metric.name] = ray_metrics.Histogram(
                    metric.name, metric.help, list(metric.buckets), names
                )
            else:
                family = ray_metrics.Counter if metric.kind is Kind.COUNTER else ray_metrics.Gauge
                self._families[metric.name] = family(metric.name.removesuffix("_total"), metric.help, names)
        return self._families[metric.name]
