"""The Review dashboard: the queue of the reviewers, and what their decisions say about the filter."""

from __future__ import annotations

from reft_ray.telemetry import catalog as c
from reft_ray.telemetry.panel import DASHBOARD as Q
from reft_ray.telemetry.panel import LAST_DAY, Board, Chart, DisplayUnit, Line, Panel, Section, Thresholds, quantiles

_REVIEW = Section(
    "Review",
    (
        Panel(
            "Quarantine",
            "Quarantined rows by review state.",
            DisplayUnit.NUMBER,
            (Line(Q.gauge(c.QUARANTINE_ROWS, "state"), "{{state}}"),),
            Thresholds(1000, 10_000),
            runbook="ReftQuarantineOld",
        ),
        Panel(
            "Oldest row that awaits review",
            "Age of the oldest pending row. The target is three days.",
            DisplayUnit.SECONDS,
            (Line(Q.gauge(c.REVIEW_OLDEST)),),
            Thresholds(172_800, 259_200),
            Chart.STAT,
            "ReftQuarantineOld",
        ),
        Panel(
            "Age at decision",
            "Median and 95th percentile of a row's age at its review decision.",
            DisplayUnit.SECONDS,
            quantiles(c.REVIEW_AGE, of=(0.5, 0.95)),
            Thresholds(172_800, 259_200),
            runbook="ReftQuarantineOld",
        ),
        Panel(
            "Decisions, last day",
            "Rows approved and rejected by reviewers.",
            DisplayUnit.NUMBER,
            (Line(LAST_DAY.increase(c.REVIEW_DECISIONS, "outcome"), "{{outcome}}"),),
        ),
        Panel(
            "Overturn rate, last day",
            "Fraction of reviewed rows that were approved: an estimate of false positives.",
            DisplayUnit.SHARE,
            (Line(LAST_DAY.share(c.REVIEW_DECISIONS, outcome="approved")),),
            Thresholds(0.1, 0.2),
            Chart.STAT,
            "ReftOverturnRateHigh",
        ),
        Panel(
            "False positives by people's decisions",
            "Harmless rows that jobs withhold: overturned rows against rows that are harmless, with the 95 % interval.",
            DisplayUnit.SHARE,
            (Line(Q.gauge(c.REVIEW_FALSE_POSITIVES, "teacher", "bound"), "{{teacher}} {{bound}}"),),
        ),
        Panel(
            "Overturned and missed",
            "Withheld rows that people approve, and sampled kept rows that they reject.",
            DisplayUnit.SHARE,
            (
                Line(Q.gauge(c.REVIEW_OVERTURNED, "teacher", bound="estimate"), "overturned {{teacher}}"),
                Line(Q.gauge(c.REVIEW_MISSED, "teacher", bound="estimate"), "missed {{teacher}}"),
            ),
        ),
    ),
)

BOARD = Board("review", "Review", "Rows that wait for a person, and the decisions of people.", (_REVIEW,))
