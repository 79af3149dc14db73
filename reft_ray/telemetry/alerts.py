"""Alerts; the runbook of each is `docs/runbooks/NAME.md`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from reft_ray.telemetry import catalog as c
from reft_ray.telemetry.promql import Query
from reft_ray.telemetry.recording_rules import AVAILABILITY, BLOCK_RATIO, FRESHNESS, LATENCY, Slo


class Severity(StrEnum):
    """`page` needs action now, `ticket` on the next working day."""

    PAGE = "page"
    TICKET = "ticket"


@dataclass(frozen=True, slots=True)
class Condition:
    """`signal` compared with a bound, e.g. `> 0.25`; the signal has a value in normal operation."""

    signal: str
    bound: str

    @property
    def expr(self) -> str:
        """The condition as PromQL; empty while it is false."""
        return f"({self.signal}) {self.bound}"


@dataclass(frozen=True, slots=True)
class Alert:
    """Fires when all conditions hold for the duration `hold`.

    `absent` alerts fire on a missing series: their signals have no value in normal operation. `window` distinguishes
    alerts of the same name.
    """

    name: str
    severity: Severity
    summary: str
    conditions: tuple[Condition, ...]
    hold: str = "0s"
    absent: bool = False
    window: str = ""

    @property
    def labels(self) -> dict[str, str]:
        """Labels added to those of the first condition."""
        return {"severity": self.severity.value} | ({"window": self.window} if self.window else {})

    @property
    def expr(self) -> str:
        """The alert as PromQL; conditions after the first add no labels."""
        first, *others = (condition.expr for condition in self.conditions)
        return " and on () ".join((first, *others))


_HOUR, _DAY, _MINUTES = Query("1h"), Query("1d"), Query("10m")


def _burn(slo: Slo, name: str) -> Iterator[Alert]:
    """Multi-window burn rate alerts (Google SRE Workbook).

    A page for 2 % of the 30-day error budget in 1 h or 5 % in 6 h, a ticket for 10 % in 1 or 3 days. The long window
    ignores short spikes; the short window resolves the alert soon after recovery.
    """
    for severity, factor, long, short, hold in (
        (Severity.PAGE, 14.4, "1h", "5m", "2m"),
        (Severity.PAGE, 6.0, "6h", "30m", "15m"),
        (Severity.TICKET, 3.0, "1d", "2h", "1h"),
        (Severity.TICKET, 1.0, "3d", "6h", "3h"),
    ):
        bound = f"> {factor * slo.budget:.4g}"
        yield Alert(
            name,
            severity,
            f"{slo.title}: error budget burn rate above {factor:g} over {long}",
            (Condition(slo.recording_rule(long).name, bound), Condition(slo.recording_rule(short).name, bound)),
            hold,
            window=long,
        )


_OBJECTIVES = (
    *_burn(AVAILABILITY, "ReftModerationAvailabilityBurn"),
    *_burn(LATENCY, "ReftModerationLatencyBurn"),
    *_burn(FRESHNESS, "ReftScreeningFreshnessBurn"),
)

_INVARIANTS = (
    Alert(
        "ReftUnscreenedRows",
        Severity.PAGE,
        "User rows reached training without a verdict",
        (Condition(_HOUR.increase_from_zero(c.UNSCREENED_ROWS), "> 0"),),
    ),
    Alert(
        "ReftUnaccountedRows",
        Severity.PAGE,
        "Input rows have no outcome",
        (Condition(_HOUR.increase_from_zero(c.UNACCOUNTED_ROWS), "> 0"),),
    ),
    Alert(
        "ReftAuditChainBroken",
        Severity.PAGE,
        "The audit log was changed or lost entries",
        (Condition(_HOUR.gauge(c.AUDIT_BREAKS), "> 0"),),
    ),
)

_FILTER = (
    Alert(
        "ReftNoTeacher",
        Severity.PAGE,
        "No teacher is available: moderation fails closed and screening stops",
        (Condition(f"absent({_HOUR.series(c.TEACHER_INFO)})", "> 0"),),
        "5m",
        absent=True,
    ),
    Alert(
        "ReftCanaryRecallLow",
        Severity.PAGE,
        "Teacher {{ $labels.teacher }} allows harmful canary prompts",
        (Condition(_HOUR.gauge(c.FILTER_CANARY_RECALL, "teacher", how="min"), "< 0.95"),),
        "5m",
    ),
    Alert(
        "ReftCanaryFalsePositives",
        Severity.TICKET,
        "Teacher {{ $labels.teacher }} does not allow harmless canary prompts",
        (Condition(_HOUR.gauge(c.FILTER_CANARY_FALSE_POSITIVES, "teacher"), "> 0.05"),),
        "15m",
    ),
    Alert(
        "ReftRejectRatioJump",
        Severity.TICKET,
        "The blocked share is more than three times its 7-day mean",
        (
            Condition(f"{BLOCK_RATIO.name} / avg_over_time({BLOCK_RATIO.name}[7d])", "> 3"),
            Condition(BLOCK_RATIO.name, "> 0.02"),
            Condition(_HOUR.increase(c.FILTER_ROWS), "> 100"),
        ),
        "15m",
    ),
    Alert(
        "ReftScoreDrift",
        Severity.TICKET,
        "Scores of stream {{ $labels.stream }} drifted from the calibration of teacher {{ $labels.teacher }}",
        (Condition(_HOUR.gauge(c.FILTER_SCORE_PSI, "stream", "teacher"), "> 0.25"),),
        "30m",
    ),
    Alert(
        "ReftTeachersDiffer",
        Severity.TICKET,
        "More than one teacher or threshold is in use in application {{ $labels.application }}",
        (
            Condition(
                "count by (application) ("
                + _HOUR.gauge(c.TEACHER_INFO, "application", "teacher", "layer", "review_threshold", "block_threshold")
                + ")",
                "> 1",
            ),
        ),
        "30m",
    ),
    Alert(
        "ReftFilterSheds",
        Severity.TICKET,
        "More than 5 % of filter requests are rejected by load shedding",
        (
            Condition(
                _MINUTES.ratio(
                    _MINUTES.rate(c.FILTER_SHED),
                    f"({_MINUTES.rate(c.FILTER_REQUEST_SECONDS)} + ({_MINUTES.rate(c.FILTER_SHED)} or vector(0)))",
                ),
                "> 0.05",
            ),
        ),
        "10m",
    ),
)

_REVIEW = (
    Alert(
        "ReftQuarantineOld",
        Severity.TICKET,
        "A quarantined row has waited more than three days for review",
        (Condition(_HOUR.gauge(c.REVIEW_OLDEST), "> 259200"),),
        "10m",
    ),
    Alert(
        "ReftOverturnRateHigh",
        Severity.TICKET,
        "Reviewers approve more than 20 % of the rows that the filter held",
        (
            Condition(_DAY.share(c.REVIEW_DECISIONS, outcome="approved"), "> 0.2"),
            Condition(_DAY.increase(c.REVIEW_DECISIONS), "> 20"),
        ),
        "1h",
    ),
)

_JOBS = (
    Alert(
        "ReftJobsStuck",
        Severity.TICKET,
        "Jobs are queued but none is running",
        (
            Condition(_HOUR.shared_gauge(c.JOBS, "project", status="queued"), "> 0"),
            Condition(f"{_HOUR.shared_gauge(c.JOBS, 'project', status='running')} or vector(0)", "== 0"),
        ),
        "30m",
    ),
    Alert(
        "ReftTrainingRestarts",
        Severity.TICKET,
        "Training restarted more than three times in an hour after losing a worker",
        (Condition(_HOUR.increase_from_zero(c.TRAIN_RESTARTS), "> 3"),),
    ),
    Alert(
        "ReftStudentHarmful",
        Severity.TICKET,
        "A finetuned model answers more than 5 % of the harmful prompts of suite {{ $labels.suite }}",
        (Condition(_HOUR.gauge(c.SAFETY_EVAL, "suite", measure="harmful_score", model="student"), "> 0.05"),),
        "5m",
    ),
    Alert(
        "ReftGateErrors",
        Severity.TICKET,
        "The release gate could not decide on a model",
        (Condition(_HOUR.increase_from_zero(c.GATE_RESULTS, result="error"), "> 0"),),
    ),
    Alert(
        "ReftGateWithholdsMany",
        Severity.TICKET,
        "The release gate withheld more than half of the models of the last day",
        (
            Condition(_DAY.share(c.GATE_RESULTS, result="withheld"), "> 0.5"),
            Condition(_DAY.increase(c.GATE_RESULTS), "> 3"),
        ),
        "15m",
    ),
)

_CLUSTER = (
    # Deployment status 1 is DEPLOY_FAILED, 2 is UNHEALTHY. Serve sets a replica's health gauge to 0 only once, when it
    # stops it. Between two crashes a deployment is healthy for a moment, hence the minimum over ten minutes.
    Alert(
        "ReftReplicaUnhealthy",
        Severity.TICKET,
        "Deployment {{ $labels.deployment }} fails repeatedly to start or to stay healthy",
        (Condition("min by (application, deployment) (min_over_time(ray_serve_deployment_status[10m]))", "< 3"),),
        "15m",
    ),
    Alert(
        "ReftTargetDown",
        Severity.TICKET,
        "Prometheus cannot scrape job {{ $labels.job }}",
        (Condition('min by (job) (up{job=~".*(ray|reft).*"})', "< 1"),),
        "10m",
    ),
)

ALERTS: tuple[Alert, ...] = (*_OBJECTIVES, *_INVARIANTS, *_FILTER, *_REVIEW, *_JOBS, *_CLUSTER)
