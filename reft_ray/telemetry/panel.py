"""What a dashboard is made of, before it becomes Grafana's JSON."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from reft_ray.telemetry.catalog import BUILD_INFO
from reft_ray.telemetry.promql import Query

DASHBOARD = Query(
    "$__rate_interval",
    {"cluster": "$cluster", "application": "$application", "teacher": "$teacher", "project": "$project"},
)
LAST_DAY = Query("1d", DASHBOARD.matchers)


def zero_if_absent(expr: str) -> str:
    """`expr`, or 0 where it has no value while a gateway answers.

    A panel of faults that is empty would not say whether there are none or nothing is scraped.
    """
    return f"{expr} or on() 0 * {DASHBOARD.gauge(BUILD_INFO)}"


class Chart(StrEnum):
    """Grafana's names of the panel types that are used."""

    TIME_SERIES = "timeseries"
    STAT = "stat"
    HEATMAP = "heatmap"
    TABLE = "table"


class DisplayUnit(StrEnum):
    """Grafana's names of display units."""

    ROWS_PER_SECOND = "rowsps"
    REQUESTS_PER_SECOND = "reqps"
    OPERATIONS_PER_SECOND = "ops"
    BYTES_PER_SECOND = "binBps"
    SECONDS = "s"
    SHARE = "percentunit"
    BYTES = "bytes"
    NUMBER = "short"


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Where values turn amber and red. `low_is_bad` turns the order round; without bounds no value is good or bad."""

    warn: float | None = None
    bad: float | None = None
    low_is_bad: bool = False


NEUTRAL = Thresholds()
ZERO = Thresholds(warn=None, bad=1e-9)


@dataclass(frozen=True, slots=True)
class Line:
    """One query with its legend; `{{label}}` is filled in by Grafana."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel: what it shows, how to read it, and the runbook of the alert that watches the same thing.

    `needs` names what a cluster must have for the panel to hold data: nothing, `serve` (Ray Serve) or `gpu`.
    """

    title: str
    description: str
    shown: DisplayUnit
    lines: tuple[Line, ...]
    level: Thresholds = NEUTRAL
    chart: Chart = Chart.TIME_SERIES
    runbook: str = ""
    needs: str = ""

    def __post_init__(self) -> None:
        if not self.lines or not self.description.endswith("."):
            raise ValueError(f"panel {self.title!r} needs at least one query and a description that is a sentence")


@dataclass(frozen=True, slots=True)
class Section:
    """A titled row of panels."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Board:
    """One dashboard; `name` becomes its file name and its uid."""

    name: str
    title: str
    description: str
    sections: tuple[Section, ...]

    @property
    def panels(self) -> tuple[Panel, ...]:
        """All panels, top to bottom."""
        return tuple(panel for section in self.sections for panel in section.panels)
