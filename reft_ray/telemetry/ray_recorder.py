"""Record in Ray processes with `ray.util.metrics`, which each node's agent exposes with the prefix `ray_`.

Ray drops a gauge 20 s after its last set, so a thread sets gauges again. A counter refuses 0. Histogram sums are
computed from bucket midpoints. Series of dead workers remain, so queries sum over WorkerId.
"""

from __future__ import annotations

from threading import Event, Thread
from typing import Any

from ray.util import metrics as ray_metrics

from reft_ray.telemetry.metric_types import APPLICATION, Kind, Labeller, Metric, Unit, check_value
from reft_ray.telemetry.recorder import SeriesCache

REFRESH_SECONDS = 5.0

# A family and the tags of one series.
Series = tuple[Any, dict[str, str]]


class RayRecorder(SeriesCache[Series]):
    """A Recorder for Ray drivers, actors and replicas. Not serializable: create it in the process that records.

    After `close`, gauges are not refreshed and disappear.
    """

    def __init__(self, labeller: Labeller | None = None, refresh_seconds: float = REFRESH_SECONDS) -> None:
        super().__init__(labeller)
        self._refresh_seconds = refresh_seconds
        self._gauges: dict[str, dict[tuple[str, ...], tuple[Any, dict[str, str], float]]] = {}
        self._closed = Event()
        self._refresher: Thread | None = None

    def count(self, metric: Metric, value: float = 1, /, **labels: str) -> None:
        counter, tags = self._series_of(metric, Kind.COUNTER, labels)
        check_value(metric, value)
        if value:
            counter.inc(value, tags)

    def observe(self, metric: Metric, value: float, /, **labels: str) -> None:
        histogram, tags = self._series_of(metric, Kind.HISTOGRAM, labels)
        check_value(metric, value)
        histogram.observe(value, tags)

    def set(self, metric: Metric, value: float | None, /, **labels: str) -> None:
        """See Recorder; a removed series disappears from Ray's exposition 20 s later."""
        gauge, tags = self._series_of(metric, Kind.GAUGE, labels)
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
        """Stop refreshing gauges; counters and histograms still work."""
        self._closed.set()
        if self._refresher is not None:
            self._refresher.join()

    def _refresh(self) -> None:
        while not self._closed.wait(self._refresh_seconds):
            with self._lock:
                for series in self._gauges.values():
                    for gauge, tags, value in series.values():
                        gauge.set(value, tags)

    def _new_family(self, metric: Metric, label_names: tuple[str, ...]) -> Any:
        if metric.kind is Kind.HISTOGRAM:
            return ray_metrics.Histogram(metric.name, metric.help, list(metric.buckets), label_names)
        family = ray_metrics.Counter if metric.kind is Kind.COUNTER else ray_metrics.Gauge
        return family(metric.name.removesuffix("_total"), metric.help, label_names)

    def _new_series(self, metric: Metric, label_values: tuple[str, ...]) -> Series:
        tags = dict(zip((APPLICATION, *metric.label_names), label_values, strict=True))
        return self._families[metric.name], tags
