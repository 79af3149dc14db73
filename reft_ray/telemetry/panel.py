"""Dashboard definitions, independent of Grafana's JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from reft_ray.telemetry.catalog import BUILD_INFO
from reft_ray.telemetry.metric_types import Metric
from reft_ray.telemetry.promql import CLUSTER, SCRAPED, Query

DASHBOARD = Query(
    "$__rate_interval",
    {"cluster": "$cluster", "application": "$application", "teacher": "$teacher", "project": "$project"},
)
LAST_DAY = Query("1d", DASHBOARD.matchers)
ON_CLUSTER = f'{CLUSTER}=~"$cluster"'
"""Matches metrics of others that belong to no application."""
NODES = f"{SCRAPED},{ON_CLUSTER}"
"""Matches Ray's metrics of nodes, which belong to no application."""


def zero_if_absent(expr: str) -> str:
    """`expr`, or 0 where it has no value while a gateway is scraped.

    An empty panel of errors would not show whether there are no errors or no data.
    """
    return f"{expr} or on() 0 * {DASHBOARD.gauge(BUILD_INFO)}"


class Chart(StrEnum):
    """Grafana panel types."""

    TIME_SERIES = "timeseries"
    STAT = "stat"
    HEATMAP = "heatmap"
    TABLE = "table"


class DisplayUnit(StrEnum):
    """Grafana unit ids."""

    ROWS_PER_SECOND = "rowsps"
    REQUESTS_PER_SECOND = "reqps"
    OPERATIONS_PER_SECOND = "ops"
    BYTES_PER_SECOND = "binBps"
    SECONDS = "s"
    SHARE = "percentunit"
    BYTES = "bytes"
    NUMBER = "short"
    CELSIUS = "celsius"
    WATT = "watt"


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Values at which a panel turns orange and red, from below with `low_is_bad`; blue without thresholds."""

    warn: float | None = None
    bad: float | None = None
    low_is_bad: bool = False


NO_THRESHOLDS = Thresholds()
MUST_BE_ZERO = Thresholds(bad=1e-9)


@dataclass(frozen=True, slots=True)
class Line:
    """One query and its legend; Grafana replaces `{{label}}`."""

    expr: str
    legend: str = ""


def quantiles(metric: Metric, *by: str, of: Sequence[float] = (0.5, 0.95, 0.99)) -> tuple[Line, ...]:
    """A line for each of these quantiles of a histogram, by the labels `by`."""
    labels = "".join(f" {{{{{label}}}}}" for label in by)
    return tuple(Line(DASHBOARD.quantile(q, metric, *by), f"p{q * 100:.0f}{labels}") for q in of)


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel, with the runbook of the alert on the same signal.

    `needs` names what the cluster must run for the panel to have data: `ray`, `serve`, `data` (a dataset of Ray Data),
    `gpu` or `dcgm` (NVIDIA's exporter); empty if nothing.
    """

    title: str
    description: str
    unit: DisplayUnit
    lines: tuple[Line, ...]
    thresholds: Thresholds = NO_THRESHOLDS
    chart: Chart = Chart.TIME_SERIES
    runbook: str = ""
    needs: str = ""

    def __post_init__(self) -> None:
        if not self.lines or not self.description.endswith("."):
            raise ValueError(f"panel {self.title!r} needs at least one query and a description that is a sentence")


@dataclass(frozen=True, slots=True)
class Section:
    """A row of panels with a title."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Board:
    """One dashboard; `name` is used in its file name and uid."""

    name: str
    title: str
    description: str
    sections: tuple[Section, ...]

    @property
    def panels(self) -> tuple[Panel, ...]:
        """All panels in order."""
        return tuple(panel for section in self.sections for panel in section.panels)
