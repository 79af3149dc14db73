"""PromQL expressions over catalogue metrics, correct across worker restarts.

Ray exposes `ray_NAME`; the scrape configuration renames it to `NAME`, as our own endpoints call it (RELABELING). Ray
keeps the series of dead workers and a restart changes WorkerId, so counters are read as sums of rates and gauges
through an aggregation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from reft_ray.telemetry.catalog import BUILD_INFO
from reft_ray.telemetry.metric_types import APPLICATION, Kind, Metric

CLUSTER = "cluster"
"""Label of the Kubernetes cluster, absent where there is only one. Ray's own cluster is `ray_io_cluster`."""

RELABELING = {
    "source_labels": ["__name__"],
    "regex": "ray_(reft_.+)",
    "target_label": "__name__",
    "replacement": "$1",
}
"""The rule under `metric_relabel_configs` that removes Ray's prefix from our metrics."""

SCRAPED = 'job=~"(.+/)?reft.*"'
"""Matches our scrape jobs: `reft...`, or `NAMESPACE/reft...` of a PodMonitor."""

SERVE_UPDATING = 3
"""The lowest deployment status of Serve that is not a failure: 1 is DEPLOY_FAILED, 2 is UNHEALTHY."""


@dataclass(frozen=True, slots=True)
class Query:
    """Builds expressions over a time `window`, with label matchers (label -> regular expression)."""

    window: str
    matchers: Mapping[str, str] = field(default_factory=dict)

    @property
    def scope(self) -> str:
        """The matchers of cluster and application, for metrics that are not in the catalogue."""
        return ",".join(f'{label}=~"{self.matchers[label]}"' for label in (CLUSTER, APPLICATION))

    def series(self, metric: Metric, suffix: str = "", /, **labels: str) -> str:
        """A selector of all series of a metric; `labels` are regular expressions."""
        known = {APPLICATION, CLUSTER, *metric.label_names}
        unknown = labels.keys() - known - {"le"}
        if unknown:
            raise ValueError(f"{metric.name} has no label {sorted(unknown)}: it has {list(metric.label_names)}")
        matchers = {label: value for label, value in self.matchers.items() if label in known} | labels
        inside = ",".join(f'{label}=~"{value}"' for label, value in matchers.items())
        return f"{metric.name}{suffix}{{{inside}}}"

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

    def increase_from_zero(self, metric: Metric, *by: str, **labels: str) -> str:
        """Increase of a counter over the window, where a new series starts from 0; 0 if there is no series.

        `increase` ignores the first sample of a series, so series younger than the window add their value instead:
        only where something of the cluster was scraped before the window, because a new Prometheus cannot tell a
        new series from an old one. It sees how series grow from its first scrape on.
        """
        now = self._counted(metric, **labels)
        before = f"offset {self.window}"
        new = f"{now} unless {now} {before} and on ({CLUSTER}) up{{{SCRAPED}}} {before}"
        return f"{_sum(by)}({new} or increase({now}[{self.window}])) or 0 * {self.gauge(BUILD_INFO, *by)}"

    def quantile(self, q: float, metric: Metric, *by: str, **labels: str) -> str:
        """A histogram quantile over the window."""
        return f"histogram_quantile({q}, {self.buckets(metric, *by, **labels)})"

    def buckets(self, metric: Metric, *by: str, **labels: str) -> str:
        """Bucket rates of a histogram by `le`, for quantiles and heat maps."""
        self._check_kind(metric, Kind.HISTOGRAM)
        return f"{_sum(('le', *by))}(rate({self.series(metric, '_bucket', **labels)}[{self.window}]))"

    def rate_above(self, bound: float, metric: Metric, *by: str, **labels: str) -> str:
        """Per-second rate of a histogram's observations above one of its bucket bounds."""
        self._check_kind(metric, Kind.HISTOGRAM)
        if bound not in metric.buckets:
            raise ValueError(f"{metric.name} has no bucket bound {bound}: it has {metric.buckets}")
        # Ray exposes the bound as 600, prometheus-client as 600.0.
        le = f"{bound:g}".replace(".", "[.]") + ("([.]0)?" if bound.is_integer() else "")
        below = f"{_sum(by)}(rate({self.series(metric, '_bucket', le=le, **labels)}[{self.window}]))"
        return f"{self.rate(metric, *by, **labels)} - {below}"

    def gauge(self, metric: Metric, *by: str, how: str = "max", **labels: str) -> str:
        """A gauge, aggregated with `how` (max, min, sum, avg) by `by`."""
        self._check_kind(metric, Kind.GAUGE)
        return f"{how}{_by(by)}({self.series(metric, **labels)})"

    def missing(self, metric: Metric, deployment: str, *by: str) -> str:
        """1 where a gauge has no series, though it had one within the window or Serve failed to start `deployment`."""
        seen = f"group by ({', '.join(by)}) (last_over_time({self.series(metric)}[{self.window}]))"
        failed = (
            f"group by ({', '.join(by)}) "
            f'(ray_serve_deployment_status{{{SCRAPED},deployment="{deployment}"}} < {SERVE_UPDATING})'
        )
        never = f"absent_over_time({self.series(metric)}[{self.window}])"
        return f"(({seen} or {failed}) unless {self.gauge(metric, *by)}) or {never}"

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
