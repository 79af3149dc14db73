"""Service level objectives and the Prometheus recording rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from reft_ray.telemetry import catalog as c
from reft_ray.telemetry.promql import Query

HOUR = Query("1h")
FILTER_ROUTES = "/v1/(moderations|screenings).*"


@dataclass(frozen=True, slots=True)
class RecordingRule:
    """A recording rule named level:metric:operation."""

    name: str
    expr: str


@dataclass(frozen=True, slots=True)
class Slo:
    """A service level objective over 30 days: the fraction `objective` of events is good.

    `bad_share` builds the expression for the fraction of bad events over a window.
    """

    name: str
    title: str
    objective: float
    bad_share: Callable[[Query], str]

    @property
    def budget(self) -> float:
        """The error budget: the fraction of events that may be bad."""
        return 1.0 - self.objective

    def recording_rule(self, window: str) -> RecordingRule:
        """The recording rule for the fraction of bad events over a window."""
        return RecordingRule(f"reft:slo_{self.name}:bad_share_rate{window}", self.bad_share(Query(window)))


def _failed_requests(query: Query) -> str:
    return query.ratio(
        query.rate(c.API_REQUESTS, route=FILTER_ROUTES, code="5.."), query.rate(c.API_REQUESTS, route=FILTER_ROUTES)
    )


AVAILABILITY = Slo("moderation_availability", "Moderation and screening requests succeed", 0.999, _failed_requests)
LATENCY = Slo(
    "moderation_latency",
    "Moderation requests finish within 500 ms",
    0.99,
    lambda query: query.above(0.5, c.FILTER_REQUEST_SECONDS, stream="moderation"),
)
FRESHNESS = Slo(
    "screening_freshness",
    "Datasets of up to 100,000 rows are screened within 10 minutes",
    0.95,
    lambda query: query.above(600.0, c.SCREENING_SECONDS, size="small"),
)
SLOS = (AVAILABILITY, LATENCY, FRESHNESS)
WINDOWS = ("5m", "30m", "1h", "2h", "6h", "1d", "3d")

BLOCK_RATIO = RecordingRule("reft:filter_block_ratio:rate1h", HOUR.share(c.FILTER_ROWS, decision="block"))
RECORDING_RULES: tuple[RecordingRule, ...] = (
    BLOCK_RATIO,
    *(slo.recording_rule(window) for slo in SLOS for window in WINDOWS),
)
