"""The Screening dashboard: datasets through the filter, what they hold, and the people who review."""

from __future__ import annotations

from reft_ray.telemetry import catalog as c
from reft_ray.telemetry.panel import DASHBOARD as Q
from reft_ray.telemetry.panel import LAST_DAY, ZERO, Board, Chart, Thresholds, Line, Panel, Section, DisplayUnit, zero_if_absent

_DATASETS = Section(
    "Datasets",
    (
        Panel(
            "Unaccounted rows, last day",
            "Rows that went in and did not come out. Anything but 0 is a defect and pages someone.",
            DisplayUnit.NUMBER,
            (Line(LAST_DAY.increase_from_zero(c.UNACCOUNTED_ROWS)),),
            ZERO,
            Chart.STAT,
            "ReftUnaccountedRows",
        ),
        Panel(
            "Rows screened",
            "Dataset rows per second, all outcomes.",
            DisplayUnit.ROWS_PER_SECOND,
            (Line(Q.rate(c.SCREENING_ROWS)),),
            chart=Chart.STAT,
        ),
        Panel(
            "Bytes read",
            "Bytes of datasets read per second.",
            DisplayUnit.BYTES_PER_SECOND,
            (Line(Q.rate(c.SCREENING_BYTES)),),
            chart=Chart.STAT,
        ),
        Panel(
            "Rows by outcome",
            "Kept, held for review, blocked and invalid rows per second.",
            DisplayUnit.ROWS_PER_SECOND,
            (Line(Q.rate(c.SCREENING_ROWS, "outcome"), "{{outcome}}"),),
        ),
        Panel(
            "Screenings ended, last day",
            "Datasets by policy and outcome; `refused` ones passed the reject ratio.",
            DisplayUnit.NUMBER,
            (Line(LAST_DAY.increase(c.SCREENING_DATASETS, "policy", "outcome"), "{{policy}} {{outcome}}"),),
        ),
        Panel(
            "Time per dataset",
            "95th percentile by size; small datasets (up to 100,000 rows) should end within 10 minutes.",
            DisplayUnit.SECONDS,
            (Line(Q.quantile(0.95, c.SCREENING_SECONDS, "size"), "{{size}}"),),
            Thresholds(450, 600),
            runbook="ReftScreeningFreshnessBurn",
        ),
    ),
)

_CONTENT = Section(
    "What was found",
    (
        Panel(
            "Findings, last day",
            "Findings beyond single rows: near-duplicates, identity prompts, refuse-then-comply answers and others.",
            DisplayUnit.NUMBER,
            (
                Line(
                    zero_if_absent(LAST_DAY.increase(c.SCREENING_FINDINGS, "finding", "severity")),
                    "{{finding}} {{severity}}",
                ),
            ),
            Thresholds(10, 100),
        ),
        Panel(
            "Invalid rows by code",
            "Rows that failed validation; one code from one moment on is usually a client's new export.",
            DisplayUnit.ROWS_PER_SECOND,
            (Line(Q.rate(c.SCREENING_INVALID, "code"), "{{code}}"),),
            Thresholds(10, 100),
        ),
        Panel(
            "Unaccounted rows by place",
            "Where rows were lost, if any were.",
            DisplayUnit.NUMBER,
            (Line(f"{LAST_DAY.increase(c.UNACCOUNTED_ROWS, 'where')} or vector(0)", "{{where}}"),),
            ZERO,
            runbook="ReftUnaccountedRows",
        ),
    ),
)

_REVIEW = Section(
    "Review",
    (
        Panel(
            "Quarantine",
            "Quarantined rows by the state of their review.",
            DisplayUnit.NUMBER,
            (Line(Q.gauge(c.QUARANTINE_ROWS, "state"), "{{state}}"),),
            Thresholds(1000, 10_000),
            runbook="ReftQuarantineOld",
        ),
        Panel(
            "Oldest row awaiting review",
            "Age of the oldest pending row. The promise is three days.",
            DisplayUnit.SECONDS,
            (Line(Q.gauge(c.REVIEW_OLDEST)),),
            Thresholds(172_800, 259_200),
            Chart.STAT,
            "ReftQuarantineOld",
        ),
        Panel(
            "Age at decision",
            "Median and 95th percentile of a row's age when a person decided on it.",
            DisplayUnit.SECONDS,
            tuple(Line(Q.quantile(q, c.REVIEW_AGE), f"p{q * 100:.0f}") for q in (0.5, 0.95)),
            Thresholds(172_800, 259_200),
            runbook="ReftQuarantineOld",
        ),
        Panel(
            "Decisions, last day",
            "Rows approved and rejected by people.",
            DisplayUnit.NUMBER,
            (Line(LAST_DAY.increase(c.REVIEW_DECISIONS, "outcome"), "{{outcome}}"),),
        ),
        Panel(
            "Overturn rate, last day",
            "Share of reviewed rows that people approved: the live estimate of false positives.",
            DisplayUnit.SHARE,
            (Line(LAST_DAY.share(c.REVIEW_DECISIONS, outcome="approved")),),
            Thresholds(0.1, 0.2),
            Chart.STAT,
            "ReftOverturnRateHigh",
        ),
    ),
)

BOARD = Board(
    "screening",
    "Screening",
    "Datasets on their way through the filter, what they hold, and the backlog of the people who review.",
    (_DATASETS, _CONTENT, _REVIEW),
)
