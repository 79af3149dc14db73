"""What a metric is: a name with a kind, a unit, bounded labels and, for histograms, buckets."""

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
    """How a metric is recorded: counters are counted, gauges set, histograms observed."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Unit(StrEnum):
    """Base units, no prefixes."""

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
    """A label whose number of values is bounded: by the listed `values`, or by `limit` where they come from outside.

    A value outside the list, or one past the limit, is recorded as `other`; telemetry never raises over a value.
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
        """The most values that this label can take, `other` included."""
        return (len(self.values) or self.limit) + 1


@dataclass(frozen=True, slots=True)
class Metric:
    """One entry of the catalogue. `name` is the name exposed by prometheus-client; Ray adds `ray_` before it."""

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
            raise ValueError(f"{self.name}: counters, and only they, end in _total")
        if (self.kind is Kind.HISTOGRAM) != bool(self.buckets):
            raise ValueError(f"{self.name}: histograms, and only they, have buckets")
        if any(low >= high for low, high in zip(self.buckets, self.buckets[1:], strict=False)):
            raise ValueError(f"{self.name}: buckets must rise, got {self.buckets}")
        if self.buckets and (self.buckets[0] <= 0 or not math.isfinite(self.buckets[-1])):
            raise ValueError(f"{self.name}: buckets must be positive and finite, got {self.buckets}")
        if not self.help.endswith("."):
            raise ValueError(f"{self.name}: help is a sentence")

    @property
    def label_names(self) -> tuple[str, ...]:
        """The declared label names, in order."""
        return tuple(label.name for label in self.labels)

    def check(self, kind: Kind, labels: Iterable[str]) -> None:
        """Raise ValueError unless this metric is of `kind` and takes exactly these label names."""
        if self.kind is not kind:
            raise ValueError(f"{self.name} is a {self.kind}, it cannot be recorded as a {kind}")
        given = set(labels)
        if given != set(self.label_names):
            raise ValueError(
                f"{self.name} takes the labels {sorted(self.label_names)}, got {sorted(given)}: "
                "pass each declared label once"
            )


def check_value(metric: Metric, value: float) -> None:
    """Raise ValueError for what a recorder cannot take: a negative count, an observation that is not finite."""
    if metric.kind is Kind.COUNTER and not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{metric.name} counts upwards: got {value}")
    if metric.kind is Kind.HISTOGRAM and not math.isfinite(value):
        raise ValueError(f"{metric.name} observes finite numbers: got {value}")


class Labeller:
    """Label values as they are recorded, within the bounds that the catalogue sets.

    `application` names the process's service and becomes a label of every series. The `project` label is recorded
    only where `projects` is True; otherwise its value is `all`, so that tenants do not show in metrics unasked.
    """

    def __init__(self, application: str = DEFAULT_APPLICATION, projects: bool = False) -> None:
        self.application = application
        self._projects = projects
        self._seen: dict[str, set[str]] = {}

    def values(self, metric: Metric, labels: Mapping[str, str]) -> tuple[str, ...]:
        """The application and the bounded label values, in the metric's own order."""
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
