"""PromQL expressions over catalogue metrics, correct for both exporters and across worker restarts.

Our own endpoints expose `NAME`, Ray exposes `ray_NAME`, so selectors match both. Ray keeps the series of dead workers
and a restart changes WorkerId, so counters are read as sums of rates and gauges through an aggregation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from reft_ray.telemetry.metric_types import APPLICATION, Kind, Metric

PREFIXES = ("", "ray_")


def names(metric: Metric, suffix: str = "") -> str:
    """The exposed names of a metric as a regular expression."""
    return "|".join(f"{prefix}{metric.name}{suffix}" for prefix in PREFIXES)


@dataclass(frozen=True, slots=True)
class Query:
    """Builds expressions over a time `window`, with label matchers (label -> regular expression)."""

    window: str
    matchers: Mapping[str, str] = field(default_factory=dict)

    def series(self, metric: Metric, suffix: str = "", /, **labels: str) -> str:
        """A selector of all series of a metric; `labels` are regular expressions."""
        known = {APPLICATION, "cluster", *metric.label_names}
        unknown = labels.keys() - known - {"le"}
        if unknown:
            raise ValueError(f"{metric.name} has no label {sorted(unknown)}: it has {list(metric.label_names)}")
        matchers = {label: value for label, value in self.matchers.items() if label in known} | labels
        inside = "".join(f',{label}=~"{value}"' for label, value in matchers.items())
        return f'{{__name__=~"{names(metric, suffix)}"{inside}}}'

    def rate(self, metric: Metric, *by: str, **labels: str) -> str:
        """Per-second rate of a counter or of a histogram's observations, summed by `by`."""
        return f"{_sum(by)}(rate({self._counted(metric, **labels)}[{self.window}]))"

    def increase(self, metric: Metric, *by: str, **labels: str) -> str:
        """Increase of a counter or of a histogram's observations over the window, summed by `by`."""
        return f"{_sum(by)}(increase({self._counted(metric, **labels)}[{self.window}]))"

    def share(self, metric: Metric, *by: str, **labels: str) -> str:
        """The fraction of a counter's rate with `labels`; 0 if no series has them."""
        whole = self.rate(metric, *by)
        return self.ratio(self.rate(metric, *by, **labels), whole)

    @staticmethod
    def ratio(part: str, whole: str) -> str:
        """`part / whole`; 0 without a value of `part`, and no value where `whole` is 0.

        0 / 0 would be NaN, and one NaN sample makes an `avg_over_time` NaN.
        """
        return f"({part} or 0 * {whole}) / ({whole} > 0)"

    def increase_from_zero(self, metric: Metric, **labels: str) -> str:
        """Increase of a counter over the window, where a new series starts from 0; 0 if there is no series.

        `increase` ignores the first sample of a series, so series younger than the window add their value instead.
        """
        now = self._counted(metric, **labels)
        before = f"{now} offset {self.window}"
        grown = f"(sum(increase({now}[{self.window}]) and {before}) or vector(0))"
        return f"{grown} + (sum({now} unless {before}) or vector(0))"

    def quantile(self, q: float, metric: Metric, *by: str, **labels: str) -> str:
        """A histogram quantile over the window."""
        return f"histogram_quantile({q}, {self.buckets(metric, *by, **labels)})"

    def buckets(self, metric: Metric, *by: str, **labels: str) -> str:
        """Bucket rates of a histogram by `le`, for quantiles and heat maps."""
        self._check_kind(metric, Kind.HISTOGRAM)
        return f"{_sum(('le', *by))}(rate({self.series(metric, '_bucket', **labels)}[{self.window}]))"

    def above(self, bound: float, metric: Metric, *by: str, **labels: str) -> str:
        """The fraction of a histogram's observations above one of its bucket bounds."""
        self._check_kind(metric, Kind.HISTOGRAM)
        if bound not in metric.buckets:
            raise ValueError(f"{metric.name} has no bucket bound {bound}: it has {metric.buckets}")
        # Ray exposes the bound as 600, prometheus-client as 600.0.
        le = f"{bound:g}".replace(".", "[.]") + ("([.]0)?" if bound.is_integer() else "")
        below = f"{_sum(by)}(rate({self.series(metric, '_bucket', le=le, **labels)}[{self.window}]))"
        return f"1 - {below} / ({self.rate(metric, *by, **labels)} > 0)"

    def gauge(self, metric: Metric, *by: str, how: str = "max", **labels: str) -> str:
        """A gauge, aggregated with `how` (max, min, sum, avg) by `by`."""
        self._check_kind(metric, Kind.GAUGE)
        return f"{how}{_by(by)}({self.series(metric, **labels)})"

    def shared_gauge(self, metric: Metric, each: str, *by: str, **labels: str) -> str:
        """A gauge that every gateway exports with the same value from the job store, summed over the label `each`."""
        return f"{_sum(by)}({self.gauge(metric, *by, each, **labels)})"

    def _counted(self, metric: Metric, **labels: str) -> str:
        if metric.kind is Kind.GAUGE:
            raise ValueError(f"{metric.name} is a gauge: it has no rate")
        return self.series(metric, "_count" if metric.kind is Kind.HISTOGRAM else "", **labels)

    @staticmethod
    def _check_kind(metric: Metric, kind: Kind) -> None:
        if metric.kind is not kind:
            raise ValueError(f"{metric.name} is a {metric.kind}, not a {kind}")


def _by(labels: tuple[str, ...]) -> str:
    return f" by ({', '.join(labels)}) " if labels else ""


def _sum(labels: tuple[str, ...]) -> str:
    return f"sum{_by(labels)}"
