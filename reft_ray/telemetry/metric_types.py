"""Metric definitions: name, kind, unit, bounded labels and, for histograms, buckets."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

OTHER = "other"
APPLICATION = "application"
DEFAULT_APPLICATION = "reft"
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_RESERVED_SUFFIXES = ("_count", "_sum", "_bucket")


class Kind(StrEnum):
    """Prometheus metric types."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Unit(StrEnum):
    """Base units without prefixes."""

    SECONDS = "seconds"
    BYTES = "bytes"
    ROWS = "rows"
    TOKENS = "tokens"
    REQUESTS = "requests"
    RATIO = "ratio"
    NATS = "nats"
    COUNT = "count"
    INFO = "info"


@dataclass(frozen=True, slots=True)
class Label:
    """A label with bounded cardinality: the listed `values`, or at most `limit` values that are not known in advance.

    Any other value is recorded as `other`; recording never raises because of a label value.
    """

    name: str
    values: tuple[str, ...] = ()
    limit: int = 0

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"label name {self.name!r} must match {_NAME.pattern}")
        if bool(self.values) == bool(self.limit):
            raise ValueError(f"label {self.name} needs either its values or a limit on their number")

    @property
    def bound(self) -> int:
        """The maximum number of values, including `other`."""
        return (len(self.values) or self.limit) + 1


@dataclass(frozen=True, slots=True)
class Metric:
    """One entry of the catalogue. prometheus-client exposes `name`; Ray adds the prefix `ray_`."""

    name: str
    kind: Kind
    unit: Unit
    help: str
    labels: tuple[Label, ...] = ()
    buckets: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or self.name.endswith(_RESERVED_SUFFIXES):
            raise ValueError(f"metric name {self.name!r} must match {_NAME.pattern} and not end in a reserved suffix")
        if (self.kind is Kind.COUNTER) != self.name.endswith("_total"):
            raise ValueError(f"{self.name}: counters end in _total, other metrics do not")
        if (self.kind is Kind.HISTOGRAM) != bool(self.buckets):
            raise ValueError(f"{self.name}: histograms have buckets, other metrics do not")
        if any(low >= high for low, high in zip(self.buckets, self.buckets[1:], strict=False)):
            raise ValueError(f"{self.name}: buckets must increase, got {self.buckets}")
        if self.buckets and (self.buckets[0] <= 0 or not math.isfinite(self.buckets[-1])):
            raise ValueError(f"{self.name}: buckets must be positive and finite, got {self.buckets}")
        if not self.help.endswith("."):
            raise ValueError(f"{self.name}: help must be a sentence that ends with a full stop")

    @property
    def label_names(self) -> tuple[str, ...]:
        """The declared label names, in order."""
        return tuple(label.name for label in self.labels)

    def check(self, kind: Kind, labels: Iterable[str]) -> None:
        """Raise ValueError unless this metric has this kind and exactly these label names."""
        if self.kind is not kind:
            raise ValueError(f"{self.name} is a {self.kind} and cannot be recorded as a {kind}")
        given = set(labels)
        if given != set(self.label_names):
            raise ValueError(
                f"{self.name} takes the labels {sorted(self.label_names)}, got {sorted(given)}: "
                "pass each declared label once"
            )


def counter(name: str, unit: Unit, help: str, *labels: Label) -> Metric:
    """A counter of the catalogue."""
    return Metric(name, Kind.COUNTER, unit, help, labels)


def gauge(name: str, unit: Unit, help: str, *labels: Label) -> Metric:
    """A gauge of the catalogue."""
    return Metric(name, Kind.GAUGE, unit, help, labels)


def histogram(name: str, unit: Unit, help: str, buckets: tuple[float, ...], *labels: Label) -> Metric:
    """A histogram of the catalogue with these upper bounds of buckets."""
    return Metric(name, Kind.HISTOGRAM, unit, help, labels, buckets)


def check_value(metric: Metric, value: float) -> None:
    """Raise ValueError for a negative or non-finite counter step and for a non-finite observation."""
    if metric.kind is Kind.COUNTER and not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{metric.name} is a counter: the step must be finite and not negative, got {value}")
    if metric.kind is Kind.HISTOGRAM and not math.isfinite(value):
        raise ValueError(f"{metric.name} is a histogram: observations must be finite, got {value}")


class Labeller:
    """Limits label values to the bounds of the catalogue.

    `application` is added as a label to every series. Unless `projects` is True, the label `project` is always `all`,
    so that metrics do not reveal tenants by default.
    """

    def __init__(self, application: str = DEFAULT_APPLICATION, projects: bool = False) -> None:
        self.application = application
        self._projects = projects
        self._seen: dict[str, set[str]] = {}

    def values(self, metric: Metric, labels: Mapping[str, str]) -> tuple[str, ...]:
        """The application and the bounded label values, in the order of the metric's labels."""
        return (self.application, *(self._bounded(label, str(labels[label.name])) for label in metric.labels))

    def _bounded(self, label: Label, value: str) -> str:
        if label.name == "project" and not self._projects:
            return "all"
        if label.values:
            return value if value in label.values else OTHER
        seen = self._seen.setdefault(label.name, set())
        if value not in seen:
            if len(seen) >= label.limit:
                return OTHER
            seen.add(value)
        return value
