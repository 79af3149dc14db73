"""Alerts, per cluster and application; the runbook of each is `docs/runbooks/NAME.md`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from reft_ray.telemetry import catalog as c
from reft_ray.telemetry.promql import CLUSTER, SCRAPED, SERVE_UPDATING, Query
from reft_ray.telemetry.recording_rules import AVAILABILITY, BLOCK_RATIO, BY, FRESHNESS, LATENCY, Slo


class Severity(StrEnum):
    """As kube-prometheus routes them: `critical` pages, `warning` is for working hours, `info` is never sent."""

    CRITICAL = "critical"
    WARNING = "warning"
    INFO = "info"


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
        """The alert as PromQL; conditions after the first hold for the same application and add no labels."""
        first, *others = (condition.expr for condition in self.conditions)
        return f" and on ({_BY}) ".join((first, *others))

    @property
    def description(self) -> str:
        """The condition in words of the rule, with the value that Prometheus found."""
        return f"Value {{{{ $value | humanize }}}}, alert {self.conditions[0].bound}, for {self.hold}."


_BY = ", ".join(BY)
_HOUR, _DAY, _MINUTES = Query("1h"), Query("1d"), Query("10m")


def _burn(slo: Slo, name: str) -> Iterator[Alert]:
    """Multi-window burn rate alerts (Google SRE Workbook).

    Critical for 2 % of the 30-day error budget in 1 h or 5 % in 6 h, a warning for 10 % in 1 or 3 days. The long window
    ignores short spikes; the short window resolves the alert soon after recovery; the least number of bad events keeps
    it quiet where there is little traffic.
    """
    for severity, factor, long, short, hold in (
        (Severity.CRITICAL, 14.4, "1h", "5m", "2m"),
        (Severity.CRITICAL, 6.0, "6h", "30m", "15m"),
        (Severity.WARNING, 3.0, "1d", "2h", "1h"),
        (Severity.WARNING, 1.0, "3d", "6h", "3h"),
    ):
        if severity is Severity.CRITICAL and not slo.pages:
            continue
        bound = f"> {factor * slo.budget:.4g}"
        yield Alert(
            name,
            severity,
            f"{slo.title}: error budget burn rate above {factor:g} over {long}",
            (
                Condition(slo.bad_share(long).name, bound),
                Condition(slo.bad_share(short).name, bound),
                Condition(slo.bad_events(long), f">= {slo.least_bad}"),
            ),
            hold,
            window=long,
        )


_OBJECTIVES = (
    *_burn(AVAILABILITY, "ReftAvailabilityBurn"),
    *_burn(LATENCY, "ReftModerationLatencyBurn"),
    *_burn(FRESHNESS, "ReftScreeningFreshnessBurn"),
)

_INVARIANTS = (
    Alert(
        "ReftUnscreenedRows",
        Severity.CRITICAL,
        "User rows reached training without a verdict",
        (Condition(_HOUR.increase_from_zero(c.UNSCREENED_ROWS, *BY), "> 0"),),
    ),
    Alert(
        "ReftUnaccountedRows",
        Severity.CRITICAL,
        "Input rows have no outcome",
        (Condition(_HOUR.increase_from_zero(c.UNACCOUNTED_ROWS, *BY), "> 0"),),
    ),
    Alert(
        "ReftAuditChainBroken",
        Severity.CRITICAL,
        "The audit log was changed or lost entries",
        (Condition(_HOUR.gauge(c.AUDIT_BREAKS, *BY), "> 0"),),
    ),
)

_FILTER = (
    Alert(
        "ReftNoTeacher",
        Severity.CRITICAL,
        "Application {{ $labels.application }} has no teacher: moderation fails closed and screening stops",
        (Condition(_DAY.missing(c.TEACHER_INFO, "Teacher", *BY), "> 0"),),
        "3m",
        absent=True,
    ),
    Alert(
        "ReftNoGateway",
        Severity.CRITICAL,
        "Application {{ $labels.application }} has no gateway: no request is answered",
        (Condition(_DAY.missing(c.BUILD_INFO, "Gateway", *BY), "> 0"),),
        "3m",
        absent=True,
    ),
    Alert(
        "ReftCanaryRecallLow",
        Severity.CRITICAL,
        "Teacher {{ $labels.teacher }} allows harmful canary prompts",
        (Condition(_HOUR.gauge(c.FILTER_CANARY_RECALL, *BY, "teacher", how="min"), "< 0.95"),),
        "5m",
    ),
    Alert(
        "ReftCanaryFalsePositives",
        Severity.WARNING,
        "Teacher {{ $labels.teacher }} does not allow harmless canary prompts",
        (Condition(_HOUR.gauge(c.FILTER_CANARY_FALSE_POSITIVES, *BY, "teacher"), "> 0.05"),),
        "15m",
    ),
    Alert(
        "ReftRejectRatioJump",
        Severity.WARNING,
        "The blocked share is more than three times its 7-day mean",
        (
            Condition(f"{BLOCK_RATIO.name} / avg_over_time({BLOCK_RATIO.name}[7d])", "> 3"),
            Condition(BLOCK_RATIO.name, "> 0.02"),
            Condition(_HOUR.increase(c.FILTER_ROWS, *BY), "> 100"),
        ),
        "15m",
    ),
    Alert(
        "ReftScoreDrift",
        Severity.WARNING,
        "Scores of stream {{ $labels.stream }} drifted from the calibration of teacher {{ $labels.teacher }}",
        (Condition(_HOUR.gauge(c.FILTER_SCORE_PSI, *BY, "stream", "teacher"), "> 0.25"),),
        "30m",
    ),
    Alert(
        "ReftTeachersDiffer",
        Severity.INFO,
        "More than one teacher or threshold is in use in application {{ $labels.application }}",
        (
            Condition(
                f"count by ({_BY}) ("
                + _HOUR.gauge(c.TEACHER_INFO, *BY, "teacher", "layer", "review_threshold", "block_threshold")
                + ")",
                "> 1",
            ),
        ),
        "30m",
    ),
    Alert(
        "ReftFilterSheds",
        Severity.WARNING,
        "More than 5 % of filter requests are rejected by load shedding",
        (
            Condition(
                _MINUTES.ratio(
                    _MINUTES.rate(c.FILTER_SHED, *BY),
                    f"({_MINUTES.rate(c.FILTER_REQUEST_SECONDS, *BY)} + {_MINUTES.rate(c.FILTER_SHED, *BY)}"
                    f" or {_MINUTES.rate(c.FILTER_REQUEST_SECONDS, *BY)})",
                ),
                "> 0.05",
            ),
            Condition(_MINUTES.increase(c.FILTER_SHED, *BY), "> 20"),
        ),
        "10m",
    ),
)

_REVIEW = (
    Alert(
        "ReftQuarantineOld",
        Severity.WARNING,
        "A quarantined row has waited more than three days for review",
        (Condition(_HOUR.gauge(c.REVIEW_OLDEST, *BY), "> 259200"),),
        "10m",
    ),
    Alert(
        "ReftOverturnRateHigh",
        Severity.WARNING,
        "Reviewers approve more than 20 % of the rows that the filter held",
        (
            Condition(_DAY.share(c.REVIEW_DECISIONS, *BY, outcome="approved"), "> 0.2"),
            Condition(_DAY.increase(c.REVIEW_DECISIONS, *BY), "> 20"),
        ),
        "1h",
    ),
)

_QUEUED = _HOUR.shared_gauge(c.JOBS, "project", *BY, status="queued")
_JOBS = (
    Alert(
        "ReftJobsStuck",
        Severity.WARNING,
        "Jobs are queued but none is running",
        (
            Condition(_QUEUED, "> 0"),
            Condition(f"{_HOUR.shared_gauge(c.JOBS, 'project', *BY, status='running')} or 0 * {_QUEUED}", "== 0"),
        ),
        "30m",
    ),
    Alert(
        "ReftTrainingRestarts",
        Severity.INFO,
        "Training restarted more than three times in an hour after losing a worker",
        (Condition(_HOUR.increase_from_zero(c.TRAIN_RESTARTS, *BY), "> 3"),),
    ),
    Alert(
        "ReftStudentHarmful",
        Severity.WARNING,
        "A released model answers more than 5 % of the harmful prompts of suite {{ $labels.suite }}",
        (
            Condition(_HOUR.gauge(c.SAFETY_EVAL, *BY, "suite", measure="harmful_score", model="student"), "> 0.05"),
            # A model that the gate withheld is not an incident.
            Condition(_HOUR.increase_from_zero(c.GATE_RESULTS, *BY, result="passed"), "> 0"),
            Condition(_HOUR.increase_from_zero(c.GATE_RESULTS, *BY, result="withheld"), "== 0"),
        ),
        "5m",
    ),
    Alert(
        "ReftGateErrors",
        Severity.WARNING,
        "The release gate could not decide on a model",
        (Condition(_HOUR.increase_from_zero(c.GATE_RESULTS, *BY, result="error"), "> 0"),),
    ),
    Alert(
        "ReftGateWithholdsMany",
        Severity.WARNING,
        "The release gate withheld more than half of the models of the last day",
        (
            Condition(_DAY.share(c.GATE_RESULTS, *BY, result="withheld"), "> 0.5"),
            Condition(_DAY.increase(c.GATE_RESULTS, *BY), "> 3"),
        ),
        "15m",
    ),
)

_CLUSTER = (
    # Serve sets a replica's health gauge to 0 only once, when it stops it, hence the status of the deployment. Between
    # two crashes a deployment is healthy for a moment, hence the minimum over ten minutes.
    Alert(
        "ReftReplicaUnhealthy",
        Severity.WARNING,
        "Deployment {{ $labels.deployment }} fails repeatedly to start or to stay healthy",
        (
            Condition(
                f"min by ({_BY}, deployment) "
                f'(min_over_time(ray_serve_deployment_status{{{SCRAPED},deployment=~"(Gateway|Teacher|Student|Guard).*"}}[10m]))',
                f"< {SERVE_UPDATING}",
            ),
        ),
        "15m",
    ),
    Alert(
        "ReftTargetDown",
        Severity.WARNING,
        "Prometheus cannot scrape job {{ $labels.job }}",
        (Condition(f"min by ({CLUSTER}, job) (up{{{SCRAPED}}})", "< 1"),),
        "10m",
    ),
)

ALERTS: tuple[Alert, ...] = (*_OBJECTIVES, *_INVARIANTS, *_FILTER, *_REVIEW, *_JOBS, *_CLUSTER)
