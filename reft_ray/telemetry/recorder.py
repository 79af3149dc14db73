"""Recording metrics: one protocol, and recorders for nothing, for tests and for a Prometheus endpoint."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from threading import Lock
from typing import Any, Protocol, TypeVar, runtime_checkable

import prometheus_client as prometheus
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.core import Metric as Family

from reft_ray.telemetry.metric_types import APPLICATION, DEFAULT_APPLICATION, Kind, Labeller, Metric, Unit, check_value

logger = logging.getLogger(__name__)

T = TypeVar("T")
# A Counter, Gauge or Histogram, as the kind that was checked says.
Child = Any
Readings = Iterable[tuple[Mapping[str, str], float]]
# Label values as given are remembered with their series; the bound keeps values from outside out of the memory.
_REMEMBERED = 10_000


@runtime_checkable
class Recorder(Protocol):
    """Where counts go. Metrics are constants of `telemetry.catalog`; every declared label is passed by name.

    All methods raise ValueError for a metric of another kind, for missing or undeclared labels, for a negative
    count and for an observation that is not finite. Label values outside their bounds become `other`.
    """

    @property
    def application(self) -> str:
        """The label `application` of every series."""
        ...

    def count(self, metric: Metric, value: float = 1, /, **labels: str) -> None:
        """Add `value` >= 0 to a counter."""
        ...

    def observe(self, metric: Metric, value: float, /, **labels: str) -> None:
        """Add one observation to a histogram."""
        ...

    def set(self, metric: Metric, value: float | None, /, **labels: str) -> None:
        """Set a gauge; None forgets the series. An info metric has one series per recorder: the last one set."""
        ...

    def close(self) -> None:
        """Deliver what is not delivered yet; the recorder is not used afterwards."""
        ...


class NullRecorder:
    """Checks what it is given and keeps nothing."""

    application = DEFAULT_APPLICATION

    def count(self, metric: Metric, value: float = 1, /, **labels: str) -> None:
        """See Recorder."""
        metric.check(Kind.COUNTER, labels)
        check_value(metric, value)

    def observe(self, metric: Metric, value: float, /, **labels: str) -> None:
        """See Recorder."""
        metric.check(Kind.HISTOGRAM, labels)
        check_value(metric, value)

    def set(self, metric: Metric, value: float | None, /, **labels: str) -> None:
        """See Recorder."""
        metric.check(Kind.GAUGE, labels)

    def close(self) -> None:
        """See Recorder."""


class MemoryRecorder:
    """Keeps everything in dictionaries, for tests and reports."""

    def __init__(self, labeller: Labeller | None = None) -> None:
        self._labeller = labeller or Labeller(projects=True)
        self._values: dict[tuple[str, tuple[str, ...]], float] = defaultdict(float)
        self._observations: dict[tuple[str, tuple[str, ...]], list[float]] = defaultdict(list)

    @property
    def application(self) -> str:
        """See Recorder."""
        return self._labeller.application

    def count(self, metric: Metric, value: float = 1, /, **labels: str) -> None:
        """See Recorder."""
        metric.check(Kind.COUNTER, labels)
        check_value(metric, value)
        self._values[metric.name, self._labeller.values(metric, labels)] += value

    def observe(self, metric: Metric, value: float, /, **labels: str) -> None:
        """See Recorder."""
        metric.check(Kind.HISTOGRAM, labels)
        check_value(metric, value)
        self._observations[metric.name, self._labeller.values(metric, labels)].append(value)

    def set(self, metric: Metric, value: float | None, /, **labels: str) -> None:
        """See Recorder."""
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
        """See Recorder."""

    def total(self, metric: Metric, **labels: str) -> float:
        """The sum over the series of a counter or gauge whose labels match; 0 where there is none."""
        return sum(value for _, value in self._matching(metric, self._values, labels))

    def observations(self, metric: Metric, **labels: str) -> list[float]:
        """All observations of a histogram's series whose labels match."""
        return [value for _, values in self._matching(metric, self._observations, labels) for value in values]

    def series(self, metric: Metric) -> list[tuple[dict[str, str], float]]:
        """Every series of a counter or gauge with its labels."""
        return list(self._matching(metric, self._values, {}))

    def _matching(
        self, metric: Metric, kept: Mapping[tuple[str, tuple[str, ...]], T], wanted: Mapping[str, str]
    ) -> Iterator[tuple[dict[str, str], T]]:
        unknown = wanted.keys() - {*metric.label_names, APPLICATION}
        if unknown:
            raise ValueError(f"{metric.name} has no label {sorted(unknown)}: it has {list(metric.label_names)}")
        for (name, values), value in kept.items():
            if name == metric.name:
                labels = dict(zip((APPLICATION, *metric.label_names), values, strict=True))
                if wanted.items() <= labels.items():
                    yield labels, value


class PrometheusRecorder:
    """Records into a registry of its own, for processes that serve `/metrics` themselves."""

    def __init__(self, labeller: Labeller | None = None) -> None:
        # The `_created` series of prometheus-client double every counter and carry nothing that Prometheus reads.
        prometheus.disable_created_metrics()
        self._registry = prometheus.CollectorRegistry()
        self._labeller = labeller or Labeller()
        self._families: dict[str, Child] = {}
        self._children: dict[tuple[object, ...], Child] = {}
        self._lock = Lock()

    @property
    def application(self) -> str:
        """See Recorder."""
        return self._labeller.application

    def count(self, metric: Metric, value: float = 1, /, **labels: str) -> None:
        """See Recorder."""
        child = self._child(metric, Kind.COUNTER, labels)
        check_value(metric, value)
        child.inc(value)

    def observe(self, metric: Metric, value: float, /, **labels: str) -> None:
        """See Recorder."""
        child = self._child(metric, Kind.HISTOGRAM, labels)
        check_value(metric, value)
        child.observe(value)

    def set(self, metric: Metric, value: float | None, /, **labels: str) -> None:
        """See Recorder."""
        child = self._child(metric, Kind.GAUGE, labels)
        if metric.unit is Unit.INFO or value is None:
            self._forget(metric, None if metric.unit is Unit.INFO else labels)
            child = self._child(metric, Kind.GAUGE, labels) if value is not None else None
        if child is not None:
            child.set(value)

    def close(self) -> None:
        """See Recorder."""

    def add_callback(self, metric: Metric, read: Callable[[], Readings]) -> None:
        """Expose what `read` returns at every scrape: figures that live in a store and survive restarts.

        `read` yields (labels, value) pairs; a failing `read` is logged and leaves the metric out of that scrape.
        """
        self._registry.register(_CallbackCollector(metric, self._labeller, read))

    def exposition(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return prometheus.generate_latest(self._registry)

    def _child(self, metric: Metric, kind: Kind, labels: Mapping[str, str]) -> Child:
        key = (kind, metric.name, *labels.items())
        child = self._children.get(key)
        if child is None:
            metric.check(kind, labels)
            with self._lock:
                child = self._family(metric).labels(*self._labeller.values(metric, labels))
                if len(self._children) < _REMEMBERED:
                    self._children[key] = child
        return child

    def _forget(self, metric: Metric, labels: Mapping[str, str] | None) -> None:
        """Drop one series of a gauge, or all of them."""
        with self._lock:
            if labels is None:
                self._families[metric.name].clear()
            else:
                self._families[metric.name].remove(*self._labeller.values(metric, labels))
            for key in [key for key in self._children if key[1] == metric.name]:
                del self._children[key]

    def _family(self, metric: Metric) -> Child:
        if metric.name not in self._families:
            names = (APPLICATION, *metric.label_names)
            if metric.kind is Kind.HISTOGRAM:
                self._families[metric.name] = prometheus.Histogram(
                    metric.name, metric.help, names, registry=self._registry, buckets=metric.buckets
                )
            else:
                family = prometheus.Counter if metric.kind is Kind.COUNTER else prometheus.Gauge
                self._families[metric.name] = family(metric.name, metric.help, names, registry=self._registry)
        return self._families[metric.name]


class _CallbackCollector:
    """A collector, in prometheus-client's sense, over a reading function."""

    def __init__(self, metric: Metric, labeller: Labeller, read: Callable[[], Readings]) -> None:
        if metric.kind is Kind.HISTOGRAM:
            raise ValueError(f"{metric.name} is a histogram: only counters and gauges can be followed")
        self._metric, self._labeller, self._read = metric, labeller, read

    def describe(self) -> list[Family]:
        """The family without samples, so that registering does not read the store."""
        return [self._family()]

    def collect(self) -> Iterator[Family]:
        """One family with a sample per reading."""
        family = self._family()
        totals: dict[tuple[str, ...], float] = defaultdict(float)
        try:
            for labels, value in self._read():
                self._metric.check(self._metric.kind, labels)
                totals[self._labeller.values(self._metric, labels)] += value
        except Exception:
            logger.exception("metric %s could not be read, this scrape goes without it", self._metric.name)
            return
        for values, total in totals.items():
            family.add_metric(values, total)
        yield family

    def _family(self) -> CounterMetricFamily | GaugeMetricFamily:
        family = CounterMetricFamily if self._metric.kind is Kind.COUNTER else GaugeMetricFamily
        return family(self._metric.name, self._metric.help, labels=(APPLICATION, *self._metric.label_names))
