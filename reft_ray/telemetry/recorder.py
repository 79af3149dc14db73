"""The Recorder protocol, with recorders that discard, that keep values in memory and that serve Prometheus."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from threading import Lock
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import prometheus_client as prometheus
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.core import Metric as Family

from reft_ray.telemetry.metric_types import APPLICATION, DEFAULT_APPLICATION, Kind, Labeller, Metric, Unit, check_value

logger = logging.getLogger(__name__)

T = TypeVar("T")
S = TypeVar("S")
Readings = Iterable[tuple[Mapping[str, str], float]]
# Cache keys hold label values as passed by the caller; the limit bounds the memory that foreign values can take.
_MAX_CACHED_SERIES = 10_000


@runtime_checkable
class Recorder(Protocol):
    """Records metrics of `telemetry.catalog`; every declared label is passed by name.

    All methods raise ValueError for a metric of the wrong kind, missing or undeclared labels, a negative counter step
    and an observation that is not finite. Label values outside their bounds become `other`.
    """

    @property
    def application(self) -> str:
        """The value of the label `application`."""
        ...

    def count(self, metric: Metric, value: float = 1, /, **labels: str) -> None:
        """Add `value` >= 0 to a counter."""
        ...

    def observe(self, metric: Metric, value: float, /, **labels: str) -> None:
        """Add one observation to a histogram."""
        ...

    def set(self, metric: Metric, value: float | None, /, **labels: str) -> None:
        """Set a gauge; None removes the series. An info metric has one series per recorder: the last one set."""
        ...

    def close(self) -> None:
        """Send pending values and release resources; the recorder must not be used afterwards."""
        ...


class NullRecorder:
    """Checks its arguments and discards them."""

    application = DEFAULT_APPLICATION

    def count(self, metric: Metric, value: float = 1, /, **labels: str) -> None:
        metric.check(Kind.COUNTER, labels)
        check_value(metric, value)

    def observe(self, metric: Metric, value: float, /, **labels: str) -> None:
        metric.check(Kind.HISTOGRAM, labels)
        check_value(metric, value)

    def set(self, metric: Metric, value: float | None, /, **labels: str) -> None:
        metric.check(Kind.GAUGE, labels)

    def close(self) -> None:
        pass


class MemoryRecorder:
    """Keeps all values in memory, for tests and reports."""

    def __init__(self, labeller: Labeller | None = None) -> None:
        self._labeller = labeller or Labeller(projects=True)
        self._values: dict[tuple[str, tuple[str, ...]], float] = defaultdict(float)
        self._observations: dict[tuple[str, tuple[str, ...]], list[float]] = defaultdict(list)

    @property
    def application(self) -> str:
        return self._labeller.application

    def count(self, metric: Metric, value: float = 1, /, **labels: str) -> None:
        metric.check(Kind.COUNTER, labels)
        check_value(metric, value)
        self._values[metric.name, self._labeller.values(metric, labels)] += value

    def observe(self, metric: Metric, value: float, /, **labels: str) -> None:
        metric.check(Kind.HISTOGRAM, labels)
        check_value(metric, value)
        self._observations[metric.name, self._labeller.values(metric, labels)].append(value)

    def set(self, metric: Metric, value: float | None, /, **labels: str) -> None:
        metric.check(Kind.GAUGE, labels)
        if metric.unit is Unit.INFO:
            for key in [key for key in self._values if key[0] == metric.name]:
                del self._values[key]
        key = metric.name, self._labeller.values(metric, labels)
        if value is None:
            self._values.pop(key, None)
        else:
            self._values[key] = value

    def close(self) -> None:
        pass

    def total(self, metric: Metric, **labels: str) -> float:
        """Sum over the matching series of a counter or gauge; 0 if none matches."""
        return sum(value for _, value in self._matching(metric, self._values, labels))

    def observations(self, metric: Metric, **labels: str) -> list[float]:
        """All observations of the matching series of a histogram."""
        return [value for _, values in self._matching(metric, self._observations, labels) for value in values]

    def series(self, metric: Metric) -> list[tuple[dict[str, str], float]]:
        """All series of a counter or gauge as (labels, value)."""
        return list(self._matching(metric, self._values, {}))

    def _matching(
        self, metric: Metric, stored: Mapping[tuple[str, tuple[str, ...]], T], wanted: Mapping[str, str]
    ) -> Iterator[tuple[dict[str, str], T]]:
        unknown = wanted.keys() - {*metric.label_names, APPLICATION}
        if unknown:
            raise ValueError(f"{metric.name} has no label {sorted(unknown)}: it has {list(metric.label_names)}")
        for (name, values), value in stored.items():
            if name == metric.name:
                labels = dict(zip((APPLICATION, *metric.label_names), values, strict=True))
                if wanted.items() <= labels.items():
                    yield labels, value


class SeriesCache(ABC, Generic[S]):
    """Base of recorders that write to a metrics client: checks each call and caches the client's object per series."""

    def __init__(self, labeller: Labeller | None = None) -> None:
        self._labeller = labeller or Labeller()
        self._families: dict[str, Any] = {}
        self._series: dict[tuple[object, ...], S] = {}
        self._lock = Lock()

    @property
    def application(self) -> str:
        return self._labeller.application

    def _series_of(self, metric: Metric, kind: Kind, labels: Mapping[str, str]) -> S:
        key = (kind, metric.name, *labels.items())
        series = self._series.get(key)
        if series is None:
            metric.check(kind, labels)
            with self._lock:
                if metric.name not in self._families:
                    self._families[metric.name] = self._new_family(metric, (APPLICATION, *metric.label_names))
                series = self._new_series(metric, self._labeller.values(metric, labels))
                if len(self._series) < _MAX_CACHED_SERIES:
                    self._series[key] = series
        return series

    @abstractmethod
    def _new_family(self, metric: Metric, label_names: tuple[str, ...]) -> Any:
        """Create the client's Counter, Gauge or Histogram."""

    @abstractmethod
    def _new_series(self, metric: Metric, label_values: tuple[str, ...]) -> S:
        """Bind the metric's family to label values."""


class PrometheusRecorder(SeriesCache[Any]):
    """Records into its own registry, for processes that serve `/metrics`."""

    def __init__(self, labeller: Labeller | None = None) -> None:
        super().__init__(labeller)
        # prometheus-client's `_created` series double the number of counters, and Prometheus does not read them.
        prometheus.disable_created_metrics()
        self._registry = prometheus.CollectorRegistry()

    def count(self, metric: Metric, value: float = 1, /, **labels: str) -> None:
        counter = self._series_of(metric, Kind.COUNTER, labels)
        check_value(metric, value)
        counter.inc(value)

    def observe(self, metric: Metric, value: float, /, **labels: str) -> None:
        histogram = self._series_of(metric, Kind.HISTOGRAM, labels)
        check_value(metric, value)
        histogram.observe(value)

    def set(self, metric: Metric, value: float | None, /, **labels: str) -> None:
        gauge = self._series_of(metric, Kind.GAUGE, labels)
        if metric.unit is Unit.INFO or value is None:
            self._remove(metric, None if metric.unit is Unit.INFO else labels)
            if value is None:
                return
            gauge = self._series_of(metric, Kind.GAUGE, labels)
        gauge.set(value)

    def close(self) -> None:
        pass

    def add_callback(self, metric: Metric, read: Callable[[], Readings]) -> None:
        """Expose the (labels, value) pairs that `read` returns at every scrape, for values kept in a store.

        If `read` fails, the error is logged and the scrape does not contain the metric.
        """
        self._registry.register(_CallbackCollector(metric, self._labeller, read))

    def exposition(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return prometheus.generate_latest(self._registry)

    def _remove(self, metric: Metric, labels: Mapping[str, str] | None) -> None:
        """Remove one series of a gauge, or all of them."""
        with self._lock:
            if labels is None:
                self._families[metric.name].clear()
            else:
                self._families[metric.name].remove(*self._labeller.values(metric, labels))
            for key in [key for key in self._series if key[1] == metric.name]:
                del self._series[key]

    def _new_family(self, metric: Metric, label_names: tuple[str, ...]) -> Any:
        if metric.kind is Kind.HISTOGRAM:
            return prometheus.Histogram(
                metric.name, metric.help, label_names, registry=self._registry, buckets=metric.buckets
            )
        family = prometheus.Counter if metric.kind is Kind.COUNTER else prometheus.Gauge
        return family(metric.name, metric.help, label_names, registry=self._registry)

    def _new_series(self, metric: Metric, label_values: tuple[str, ...]) -> Any:
        return self._families[metric.name].labels(*label_values)


class _CallbackCollector:
    """A prometheus-client collector over a callback."""

    def __init__(self, metric: Metric, labeller: Labeller, read: Callable[[], Readings]) -> None:
        if metric.kind is Kind.HISTOGRAM:
            raise ValueError(f"{metric.name} is a histogram: callbacks are supported for counters and gauges only")
        self._metric, self._labeller, self._read = metric, labeller, read

    def describe(self) -> list[Family]:
        """The family without samples, so that registration does not read the store."""
        return [self._family()]

    def collect(self) -> Iterator[Family]:
        """One family with one sample per label set."""
        family = self._family()
        totals: dict[tuple[str, ...], float] = defaultdict(float)
        try:
            for labels, value in self._read():
                self._metric.check(self._metric.kind, labels)
                totals[self._labeller.values(self._metric, labels)] += value
        except Exception:
            logger.exception("could not read metric %s; this scrape does not contain it", self._metric.name)
            return
        for values, total in totals.items():
            family.add_metric(values, total)
        yield family

    def _family(self) -> CounterMetricFamily | GaugeMetricFamily:
        family = CounterMetricFamily if self._metric.kind is Kind.COUNTER else GaugeMetricFamily
        return family(self._metric.name, self._metric.help, labels=(APPLICATION, *self._metric.label_names))
