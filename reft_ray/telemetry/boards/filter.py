"""The Filter dashboard: what the teacher decides, why, how fast and how steadily."""

from __future__ import annotations

from reft_ray.telemetry import catalog as c
from reft_ray.telemetry import recording_rules
from reft_ray.telemetry.panel import DASHBOARD as Q
from reft_ray.telemetry.panel import Board, Chart, Thresholds, Line, Panel, Section, DisplayUnit, zero_if_absent

_DECISIONS = Section(
    "Decisions",
    (
        Panel(
            "Rows judged",
            "Rows per second through the teacher, all streams.",
            DisplayUnit.ROWS_PER_SECOND,
            (Line(Q.rate(c.FILTER_ROWS)),),
            chart=Chart.STAT,
        ),
        Panel(
            "Blocked share",
            "Share of judged rows that were blocked. A jump is an attack, a broken client or a broken teacher.",
            DisplayUnit.SHARE,
            (Line(Q.share(c.FILTER_ROWS, decision="block")),),
            Thresholds(0.1, 0.3),
            Chart.STAT,
            "ReftRejectRatioJump",
        ),
        Panel(
            "Canary recall",
            "Share of the sealed harmful prompts that are not allowed; below 1 the filter lets harm through.",
            DisplayUnit.SHARE,
            (Line(Q.gauge(c.FILTER_CANARY_RECALL, how="min")),),
            Thresholds(1.0, 0.95, low_is_bad=True),
            Chart.STAT,
            "ReftCanaryRecallLow",
        ),
        Panel(
            "Moderation p99",
            "99 % of moderation requests end within this time. The objective is 0.5 s.",
            DisplayUnit.SECONDS,
            (Line(Q.quantile(0.99, c.FILTER_REQUEST_SECONDS, stream="moderation")),),
            Thresholds(0.4, 0.5),
            Chart.STAT,
            "ReftModerationLatencyBurn",
        ),
        Panel(
            "Rows by decision",
            "Allowed, held for review and blocked rows per second.",
            DisplayUnit.ROWS_PER_SECOND,
            (Line(Q.rate(c.FILTER_ROWS, "decision"), "{{decision}}"),),
        ),
        Panel(
            "Rows not allowed, by reason",
            "Why rows were held or blocked: the score, an encoding that was read, a second guard, or no readable text.",
            DisplayUnit.ROWS_PER_SECOND,
            (Line(Q.rate(c.FILTER_ROWS, "reason", decision="review|block"), "{{reason}}"),),
        ),
        Panel(
            "Blocked share against the last 7 days",
            "The share blocked in the last hour beside its mean of 7 days; three times the mean raises an alert.",
            DisplayUnit.SHARE,
            (
                Line(recording_rules.BLOCK_RATIO.name, "last hour"),
                Line(f"avg_over_time({recording_rules.BLOCK_RATIO.name}[7d])", "mean of 7 days"),
            ),
            Thresholds(0.1, 0.3),
            runbook="ReftRejectRatioJump",
        ),
        Panel(
            "Rows by stream",
            "Where judged rows come from: live moderation, streamed screenings, datasets or chat.",
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
            "Distribution of (1 + cosine) / 2 over time; two bands far apart mean that the teacher separates well.",
            DisplayUnit.ROWS_PER_SECOND,
            (Line(Q.buckets(c.FILTER_SCORE), "{{le}}"),),
            chart=Chart.HEATMAP,
            runbook="ReftScoreDrift",
        ),
        Panel(
            "Population stability index",
            "Distance of recent scores from the calibration histogram: above 0.1 look, above 0.25 act.",
            DisplayUnit.NUMBER,
            (Line(Q.gauge(c.FILTER_SCORE_PSI, "stream", "teacher"), "{{stream}} {{teacher}}"),),
            Thresholds(0.1, 0.25),
            runbook="ReftScoreDrift",
        ),
        Panel(
            "Mean shift",
            "Mean of recent scores minus the calibration mean; positive means more refusal-like rows.",
            DisplayUnit.NUMBER,
            (Line(Q.gauge(c.FILTER_SCORE_MEAN_SHIFT, "stream", "teacher"), "{{stream}} {{teacher}}"),),
            Thresholds(0.05, 0.1),
            runbook="ReftScoreDrift",
        ),
        Panel(
            "Canary prompts",
            "Sealed prompt pairs scored by every teacher: harmful ones caught, harmless ones caught by mistake.",
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
            "Every teacher that answers, with its layer and thresholds; more than one only while a new one rolls out.",
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
            "Median, 95th and 99th percentile from a request's arrival to its last verdict, by stream.",
            DisplayUnit.SECONDS,
            tuple(
                Line(Q.quantile(q, c.FILTER_REQUEST_SECONDS, "stream"), f"p{q * 100:.0f} {{{{stream}}}}")
                for q in (0.5, 0.95, 0.99)
            ),
            Thresholds(0.4, 0.5),
            runbook="ReftModerationLatencyBurn",
        ),
        Panel(
            "Where the time goes",
            "95th percentile of waiting for a batch, tokenising it and its forward pass.",
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
            "Median texts and tokens in a forward batch; small batches under load waste the processor.",
            DisplayUnit.NUMBER,
            (
                Line(Q.quantile(0.5, c.FILTER_BATCH_ROWS), "texts"),
                Line(Q.quantile(0.5, c.FILTER_BATCH_TOKENS), "tokens"),
            ),
        ),
        Panel(
            "Waste and reuse",
            "Share of padding among tokens (the aim is under 10 %), and of look-ups answered by the score cache.",
            DisplayUnit.SHARE,
            (
                Line(Q.share(c.FILTER_TOKENS, content="padding"), "padding"),
                Line(Q.share(c.FILTER_CACHE, result="hit"), "cache hits"),
            ),
            Thresholds(0.1, 0.2),
        ),
    ),
)

_TROUBLE = Section(
    "Trouble",
    (
        Panel(
            "Errors",
            "Requests that failed on our side, by type; none of them was answered with an allow.",
            DisplayUnit.OPERATIONS_PER_SECOND,
            (Line(zero_if_absent(Q.rate(c.FILTER_ERRORS, "error_type")), "{{error_type}}"),),
            Thresholds(0.01, 0.1),
            runbook="ReftModerationAvailabilityBurn",
        ),
        Panel(
            "Requests shed",
            "Requests refused to protect the service, by reason; lasting shedding asks for more replicas.",
            DisplayUnit.REQUESTS_PER_SECOND,
            (Line(zero_if_absent(Q.rate(c.FILTER_SHED, "reason")), "{{reason}}"),),
            Thresholds(0.1, 1),
            runbook="ReftFilterSheds",
        ),
        Panel(
            "Queue",
            "Texts that wait for the teacher, over all replicas.",
            DisplayUnit.NUMBER,
            (Line(Q.gauge(c.FILTER_QUEUE_DEPTH, how="sum"), "texts"),),
            Thresholds(500, 2000),
            runbook="ReftFilterSheds",
        ),
        Panel(
            "Truncations and retries",
            "Rows with unread text, and batches sent again after a replica was lost.",
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
    "What the Ref-Teacher lets through, holds and blocks, why, how well and how fast.",
    (_DECISIONS, _SCORES, _SPEED, _TROUBLE),
)
