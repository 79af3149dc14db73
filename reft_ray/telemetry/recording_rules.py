"""Service level objectives and the Prometheus recording rules, all per cluster and application."""

from __future__ import annotations

from dataclasses import dataclass

from reft_ray.telemetry import catalog as c
from reft_ray.telemetry.metric_types import APPLICATION
from reft_ray.telemetry.promql import CLUSTER, SCRAPED, Query

BY = (CLUSTER, APPLICATION)
INTERVAL_SECONDS = 60
"""How often rules are evaluated; a sum of rates over time is multiplied by it to count events."""

_SHORT, _HOUR = Query("5m"), Query("1h")


@dataclass(frozen=True, slots=True)
class RecordingRule:
    """A recording rule named level:metric:operation."""

    name: str
    expr: str


@dataclass(frozen=True, slots=True)
class Slo:
    """A service level objective over 30 days: the fraction `objective` of events is good.

    `events` and `bad` are rates per second over five minutes. Fewer than `least_bad` bad events in a window raise
    no alert, however few the events are. Without `pages`, alerts only warn.
    """

    name: str
    title: str
    objective: float
    events: str
    bad: str
    least_bad: int
    pages: bool = True

    @property
    def budget(self) -> float:
        """The error budget: the fraction of events that may be bad."""
        return 1.0 - self.objective

    @property
    def rates(self) -> tuple[RecordingRule, RecordingRule]:
        """The recording rules from which all windows are computed: events, and bad events, per second."""
        name = f"reft:slo_{self.name}"
        return (
            RecordingRule(f"{name}:events_rate5m", self.events),
            RecordingRule(f"{name}:bad_rate5m", f"{self.bad} or 0 * {self.events}"),
        )

    def bad_share(self, window: str) -> RecordingRule:
        """The recording rule for the fraction of bad events over a window; no value without events."""
        events, bad = (rule.name if window == "5m" else f"sum_over_time({rule.name}[{window}])" for rule in self.rates)
        return RecordingRule(f"reft:slo_{self.name}:bad_share{window}", f"{bad} / ({events} > 0)")

    def bad_events(self, window: str) -> str:
        """The number of bad events over a window."""
        return f"{INTERVAL_SECONDS} * sum_over_time({self.rates[1].name}[{window}])"


def _proxied(**labels: str) -> str:
    """Rate of the requests that Serve's proxies answered, those without a gateway included."""
    inside = "".join(f',{label}=~"{value}"' for label, value in labels.items())
    return (
        f'sum by ({", ".join(BY)}) (rate(ray_serve_num_http_requests_total{{{SCRAPED},application!=""{inside}}}[5m]))'
    )


AVAILABILITY = Slo(
    "availability", "Requests succeed at the proxy", 0.999, _proxied(), _proxied(status_code="5.."), least_bad=10
)
LATENCY = Slo(
    "moderation_latency",
    "Moderation requests finish within 500 ms",
    0.99,
    _SHORT.rate(c.FILTER_REQUEST_SECONDS, *BY, stream="moderation"),
    _SHORT.rate_above(0.5, c.FILTER_REQUEST_SECONDS, *BY, stream="moderation"),
    least_bad=10,
)
FRESHNESS = Slo(
    "screening_freshness",
    "Datasets of up to 100,000 rows are screened within 10 minutes",
    0.95,
    _SHORT.rate(c.SCREENING_SECONDS, *BY, size="small"),
    _SHORT.rate_above(600.0, c.SCREENING_SECONDS, *BY, size="small"),
    least_bad=3,
    pages=False,
)
SLOS = (AVAILABILITY, LATENCY, FRESHNESS)
BUDGET_WINDOW = "30d"
WINDOWS = ("5m", "30m", "1h", "2h", "6h", "1d", "3d", BUDGET_WINDOW)

BLOCK_RATIO = RecordingRule("reft:filter_block_ratio:rate1h", _HOUR.share(c.FILTER_ROWS, *BY, decision="block"))
RECORDING_RULES: tuple[RecordingRule, ...] = (
    BLOCK_RATIO,
    *(rule for slo in SLOS for rule in (*slo.rates, *(slo.bad_share(window) for window in WINDOWS))),
)
