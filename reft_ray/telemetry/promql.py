"""PromQL for catalogue metrics, right under both expositions and under workers that come and go.

A metric stands as `NAME` on our own endpoints and as `ray_NAME` on Ray's, so selectors match either. Series of dead
workers stay and restarts change WorkerId, so counters are read as sums of rates, gauges through an aggregation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from reft_ray.telemetry.metric_types import APPLICATION, Kind, Metric

PREFIXES = ("", "ray_")


def names(metric: Metric, suffix: str = "") -> str:
    """The exposed names of a metric as an alternation for a regular expression."""
    return "|".join(f"{prefix}{metric.name}{suffix}" for prefix in PREFIXES)


@dataclass(frozen=True, slots=True)
class Query:
    """Builds expressions over one time `window`, restricted by label matchers (label -> regular expression)."""

    window: str
    matchers: Mapping[str, str] = field(default_factory=dict)

    def series(self, metric: Metric, suffix: str = "", /, **labels: str) -> str:
        """A selector of all series of a metric; `labels` are regular expressions."""
        own = {APPLICATION, "cluster", *metric.label_names}
        unknown = labels.keys() - own - {"le"}
        if unknown:
            raise ValueError(f"{metric.name} has no label {sorted(unknown)}: it has {list(metric.label_names)}")
        matchers = {label: value for label, value in self.matchers.items() if label in own} | labels
        inside = "".join(f',{label}=~"{value}"' for label, value in matchers.items())
        return f'{{__name__=~"{names(metric, suffix)}"{inside}}}'

    def rate(self, metric: Metric, *by: str, **labels: str) -> str:
        """Per-second rate of a counter, or of a histogram's observations, summed over everything but `by`."""
        return f"{_sum(by)}(rate({self._counted(metric, **labels)}[{self.window}]))"

    def increase(self, metric: Metric, *by: str, **labels: str) -> str:
        """What a counter, or a histogram's observations, grew by in the window."""
        return f"{_sum(by)}(increase({self._counted(metric, **labels)}[{self.window}]))"

    def share(self, metric: Metric, *by: str, **labels: str) -> str:
        """The part of a counter's rate that has `labels`, in 0..1; 0 while none has."""
        whole = self.rate(metric, *by)
        return self.ratio(self.rate(metric, *by, **labels), whole)

    @staticmethod
    def ratio(part: str, whole: str) -> str:
        """`part / whole`; 0 where `part` has no value, and no value where `whole` is 0.

        0 / 0 would be NaN, and one NaN makes every average over time that holds it NaN.
        """
        return f"({part} or 0 * {whole}) / ({whole} > 0)"

    def increase_from_zero(self, metric: Metric, **labels: str) -> str:
        """How much a counter that must stay 0 counted in the window; 0 where it does not exist.

        A series that is born at 5 has no increase, so series younger than the window count with their value.
        """
        now = self._counted(metric, **labels)
        before = f"{now} offset {self.window}"
        grown = f"(sum(increase({now}[{self.window}]) and {before}) or vector(0))"
        return f"{grown} + (sum({now} unless {before}) or vector(0))"

    def quantile(self, q: float, metric: Metric, *by: str, **labels: str) -> str:
        """A quantile of a histogram over the window."""
        return f"histogram_quantile({q}, {self.buckets(metric, *by, **labels)})"

    def buckets(self, metric: Metric, *by: str, **labels: str) -> str:
        """The bucket rates of a histogram by `le`, for quantiles and heat maps."""
        self._is(metric, Kind.HISTOGRAM)
        return f"{_sum(('le', *by))}(rate({self.series(metric, '_bucket', **labels)}[{self.window}]))"

    def above(self, bound: float, metric: Metric, *by: str, **labels: str) -> str:
        """The share of a histogram's observations above one of its bucket bounds."""
        self._is(metric, Kind.HISTOGRAM)
        if bound not in metric.buckets:
            raise ValueError(f"{metric.name} has no bucket bound {bound}: it has {metric.buckets}")
        # Ray writes 600 where prometheus-client writes 600.0
        le = f"{bound:g}".replace(".", "[.]") + ("([.]0)?" if bound.is_integer() else "")
        below = f"{_sum(by)}(rate({self.series(metric, '_bucket', le=le, **labels)}[{self.window}]))"
        return f"1 - {below} / ({self.rate(metric, *by, **labels)} > 0)"

    def gauge(self, metric: Metric, *by: str, how: str = "max", **labels: str) -> str:
        """A gauge, aggregated by `how` (max, min, sum, avg) over everything but `by`."""
        self._is(metric, Kind.GAUGE)
        return f"{how}{_by(by)}({self.series(metric, **labels)})"

    def shared_gauge(self, metric: Metric, each: str, *by: str, **labels: str) -> str:
        """A gauge that every gateway reads from one store: the same figure from all, summed over the label `each`."""
        return f"{_sum(by)}({self.gauge(metric, *by, each, **labels)})"

    def _counted(self, metric: Metric, **labels: str) -> str:
        if metric.kind is Kind.GAUGE:
            raise ValueError(f"{metric.name} is a gauge: it has no rate")
        return self.series(metric, "_count" if metric.kind is Kind.HISTOGRAM else "", **labels)

    @staticmethod
    def _is(metric: Metric, kind: Kind) -> None:
        if metric.kind is not kind:
            raise ValueError(f"{metric.name} is a {metric.kind}, not a {kind}")


def _by(labels: tuple[str, ...]) -> str:
    return f" by ({', '.join(labels)}) " if labels else ""


def _sum(labels: tuple[str, ...]) -> str:
    return f"sum{_by(labels)}"
