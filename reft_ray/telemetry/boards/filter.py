"""The Filter dashboard: decisions, scores, latency and errors of the teacher."""

from __future__ import annotations

from reft_ray.telemetry import catalog as c
from reft_ray.telemetry import recording_rules
from reft_ray.telemetry.panel import DASHBOARD as Q
from reft_ray.telemetry.panel import (
    Board,
    Chart,
    DisplayUnit,
    Line,
    Panel,
    Section,
    Thresholds,
    quantiles,
    zero_if_absent,
)

_BLOCKED = f"{recording_rules.BLOCK_RATIO.name}{{{Q.scope}}}"

_DECISIONS = Section(
    "Decisions",
    (
        Panel(
            "Rows judged",
            "Rows per second judged by the teacher, all streams.",
            DisplayUnit.ROWS_PER_SECOND,
            (Line(Q.rate(c.FILTER_ROWS)),),
            chart=Chart.STAT,
        ),
        Panel(
            "Blocked share",
            "Fraction of judged rows that were blocked. A jump means an attack, a broken client or a broken teacher.",
            DisplayUnit.SHARE,
            (Line(Q.share(c.FILTER_ROWS, decision="block")),),
            Thresholds(0.1, 0.3),
            Chart.STAT,
            "ReftRejectRatioJump",
        ),
        Panel(
            "Canary recall",
            "Fraction of the harmful canary prompts that are not allowed; below 1 the filter allows harmful rows.",
            DisplayUnit.SHARE,
            (Line(Q.gauge(c.FILTER_CANARY_RECALL, how="min")),),
            Thresholds(1.0, 0.95, low_is_bad=True),
            Chart.STAT,
            "ReftCanaryRecallLow",
        ),
        Panel(
            "Moderation p99",
            "99th percentile of the moderation request duration. The objective is 0.5 s.",
            DisplayUnit.SECONDS,
            (Line(Q.quantile(0.99, c.FILTER_REQUEST_SECONDS, stream="moderation")),),
            Thresholds(0.4, 0.5),
            Chart.STAT,
            "ReftModerationLatencyBurn",
        ),
        Panel(
            "Rows by decision",
            "Rows per second that were allowed, held for review and blocked.",
            DisplayUnit.ROWS_PER_SECOND,
            (Line(Q.rate(c.FILTER_ROWS, "decision"), "{{decision}}"),),
        ),
        Panel(
            "Rows not allowed, by reason",
            "Why rows were held or blocked: the score, decoded text, a second guard, or no readable text.",
            DisplayUnit.ROWS_PER_SECOND,
            (Line(Q.rate(c.FILTER_ROWS, "reason", decision="review|block"), "{{reason}}"),),
        ),
        Panel(
            "Blocked share against the last 7 days",
            "Blocked share in the last hour and its 7-day mean; three times the mean fires an alert.",
            DisplayUnit.SHARE,
            (
                Line(f"max({_BLOCKED})", "last hour"),
                Line(f"max(avg_over_time({_BLOCKED}[7d]))", "7-day mean"),
            ),
            Thresholds(0.1, 0.3),
            runbook="ReftRejectRatioJump",
        ),
        Panel(
            "Rows by stream",
            "Source of the judged rows: moderation, streamed screenings, datasets or chat.",
            DisplayUnit.ROWS_PER_SECOND,
            (Line(Q.rate(c.FILTER_ROWS, "stream"), "{{stream}}"),),
        ),
    ),
)

_SCORES = Section(
    "Scores and drift",
    (
        Panel(
            "Refusal scores",
            "Distribution of (1 + cosine) / 2 over time; two distant bands mean good separation.",
            DisplayUnit.ROWS_PER_SECOND,
            (Line(Q.buckets(c.FILTER_SCORE), "{{le}}"),),
            chart=Chart.HEATMAP,
            runbook="ReftScoreDrift",
        ),
        Panel(
            "Population stability index",
            "Distance of recent scores from the calibration histogram: 0.1 is moderate, 0.25 significant drift.",
            DisplayUnit.NUMBER,
            (Line(Q.gauge(c.FILTER_SCORE_PSI, "stream", "teacher"), "{{stream}} {{teacher}}"),),
            Thresholds(0.1, 0.25),
            runbook="ReftScoreDrift",
        ),
        Panel(
            "Mean shift",
            "Mean of recent scores minus the calibration mean; positive means more rows that resemble refusals.",
            DisplayUnit.NUMBER,
            (Line(Q.gauge(c.FILTER_SCORE_MEAN_SHIFT, "stream", "teacher"), "{{stream}} {{teacher}}"),),
            Thresholds(0.05, 0.1),
            runbook="ReftScoreDrift",
        ),
        Panel(
            "Canary prompts",
            "Canary prompts that each teacher does not allow: recall on harmful, false positives on harmless prompts.",
            DisplayUnit.SHARE,
            (
                Line(Q.gauge(c.FILTER_CANARY_RECALL, "teacher", how="min"), "recall {{teacher}}"),
                Line(Q.gauge(c.FILTER_CANARY_FALSE_POSITIVES, "teacher"), "false positives {{teacher}}"),
            ),
            Thresholds(1.0, 0.95, low_is_bad=True),
            runbook="ReftCanaryRecallLow",
        ),
        Panel(
            "Teachers",
            "Teachers in use with layer and thresholds; more than one only during a rollout.",
            DisplayUnit.NUMBER,
            (Line(Q.gauge(c.TEACHER_INFO, "teacher", "layer", "review_threshold", "block_threshold")),),
            Thresholds(1, 2),
            Chart.TABLE,
            "ReftTeachersDiffer",
        ),
    ),
)

_SPEED = Section(
    "Speed",
    (
        Panel(
            "Request time",
            "Median, 95th and 99th percentile from arrival to the last verdict, by stream.",
            DisplayUnit.SECONDS,
            quantiles(c.FILTER_REQUEST_SECONDS, "stream"),
            Thresholds(0.4, 0.5),
            runbook="ReftModerationLatencyBurn",
        ),
        Panel(
            "Latency breakdown",
            "95th percentile of queueing, tokenising and the forward pass.",
            DisplayUnit.SECONDS,
            (
                Line(Q.quantile(0.95, c.FILTER_QUEUE_SECONDS), "queue"),
                Line(Q.quantile(0.95, c.FILTER_TOKENISE_SECONDS), "tokenise"),
                Line(Q.quantile(0.95, c.FILTER_FORWARD_SECONDS), "forward"),
            ),
            Thresholds(0.25, 0.5),
            runbook="ReftModerationLatencyBurn",
        ),
        Panel(
            "Batch size",
            "Median texts and tokens per forward batch; small batches under load waste compute.",
            DisplayUnit.NUMBER,
            (
                Line(Q.quantile(0.5, c.FILTER_BATCH_ROWS), "texts"),
                Line(Q.quantile(0.5, c.FILTER_BATCH_TOKENS), "tokens"),
            ),
        ),
        Panel(
            "Padding and cache hits",
            "Padding as a fraction of tokens (target: below 10 %), and the hit rate of the score cache.",
            DisplayUnit.SHARE,
            (
                Line(Q.share(c.FILTER_TOKENS, content="padding"), "padding"),
                Line(Q.share(c.FILTER_CACHE, result="hit"), "cache hits"),
            ),
            Thresholds(0.1, 0.2),
        ),
    ),
)

_ERRORS = Section(
    "Errors and load shedding",
    (
        Panel(
            "Errors",
            "Requests per second that failed in the service, by type; none was answered with an allow.",
            DisplayUnit.OPERATIONS_PER_SECOND,
            (Line(zero_if_absent(Q.rate(c.FILTER_ERRORS, "error_type")), "{{error_type}}"),),
            Thresholds(0.01, 0.1),
            runbook="ReftAvailabilityBurn",
        ),
        Panel(
            "Requests shed",
            "Requests per second rejected by load shedding, by reason; sustained shedding needs more replicas.",
            DisplayUnit.REQUESTS_PER_SECOND,
            (Line(zero_if_absent(Q.rate(c.FILTER_SHED, "reason")), "{{reason}}"),),
            Thresholds(0.1, 1),
            runbook="ReftFilterSheds",
        ),
        Panel(
            "Queue",
            "Texts waiting for the teacher, sum over replicas.",
            DisplayUnit.NUMBER,
            (Line(Q.gauge(c.FILTER_QUEUE_DEPTH, how="sum"), "texts"),),
            Thresholds(500, 2000),
            runbook="ReftFilterSheds",
        ),
        Panel(
            "Truncations and retries",
            "Truncated rows and retried batches per second.",
            DisplayUnit.OPERATIONS_PER_SECOND,
            (
                Line(zero_if_absent(Q.rate(c.FILTER_TRUNCATIONS, "stream")), "truncated {{stream}}"),
                Line(zero_if_absent(Q.rate(c.FILTER_RETRIES)), "retried batches"),
            ),
            Thresholds(0.1, 1),
        ),
    ),
)

BOARD = Board(
    "filter",
    "Filter",
    "Decisions, scores, latency and errors of the Ref-Teacher filter.",
    (_DECISIONS, _SCORES, _SPEED, _ERRORS),
)
