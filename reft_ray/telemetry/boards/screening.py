"""The Screening dashboard: datasets through the filter, what they hold, and the people who review."""

from __future__ import annotations

from reft_ray.telemetry import catalog as c
from reft_ray.telemetry.panel import DASHBOARD as Q
from reft_ray.telemetry.panel import LAST_DAY, ZERO, Board, Chart, Level, Line, Panel, Section, Shown, calm

_DATASETS = Section(
    "Datasets",
    (
        Panel(
            "Unaccounted rows, last day",
            "Rows that went in and did not come out. Anything but 0 is a defect and pages someone.",
            Shown.NUMBER,
            (Line(LAST_DAY.seen(c.UNACCOUNTED_ROWS)),),
            ZERO,
            Chart.STAT,
            "ReftUnaccountedRows",
        ),
        Panel(
            "Rows screened",
            "Dataset rows per second, all outcomes.",
            Shown.ROWS_PER_SECOND,
            (Line(Q.rate(c.SCREENING_ROWS)),),
            chart=Chart.STAT,
        ),
        Panel(
            "Bytes read",
            "Bytes of datasets read per second.",
            Shown.BYTES_PER_SECOND,
            (Line(Q.rate(c.SCREENING_BYTES)),),
            chart=Chart.STAT,
        ),
        Panel(
            "Rows by outcome",
            "Kept, held for review, blocked and invalid rows per second.",
            Shown.ROWS_PER_SECOND,
            (Line(Q.rate(c.SCREENING_ROWS, "outcome"), "{{outcome}}"),),
        ),
        Panel(
            "Screenings ended, last day",
            "Datasets by policy and outcome; `refused` ones passed the reject ratio.",
            Shown.NUMBER,
            (Line(LAST_DAY.increase(c.SCREENING_DATASETS, "policy", "outcome"), "{{policy}} {{outcome}}"),),
        ),
        Panel(
            "Time per dataset",
            "95th percentile by size; small datasets (up to 100,000 rows) should end within 10 minutes.",
            Shown.SECONDS,
            (Line(Q.quantile(0.95, c.SCREENING_SECONDS, "size"), "{{size}}"),),
            Level(450, 600),
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
            Shown.NUMBER,
            (
                Line(
                    calm(LAST_DAY.increase(c.SCREENING_FINDINGS, "finding", "severity")),
                    "{{finding}} {{severity}}",
                ),
            ),
            Level(10, 100),
        ),
        Panel(
            "Invalid rows by code",
            "Rows that failed validation; one code from one moment on is usually a client's new export.",
            Shown.ROWS_PER_SECOND,
            (Line(Q.rate(c.SCREENING_INVALID, "code"), "{{code}}"),),
            Level(10, 100),
        ),
        Panel(
            "Unaccounted rows by place",
            "Where rows were lost, if any were.",
            Shown.NUMBER,
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
            Shown.NUMBER,
            (Line(Q.gauge(c.QUARANTINE_ROWS, "state"), "{{state}}"),),
            Level(1000, 10_000),
            runbook="ReftQuarantineOld",
        ),
        Panel(
            "Oldest row awaiting review",
            "Age of the oldest pending row. The promise is three days.",
            Shown.SECONDS,
            (Line(Q.gauge(c.REVIEW_OLDEST)),),
            Level(172_800, 259_200),
            Chart.STAT,
            "ReftQuarantineOld",
        ),
        Panel(
            "Age at decision",
            "Median and 95th percentile of a row's age when a person decided on it.",
            Shown.SECONDS,
            tuple(Line(Q.quantile(q, c.REVIEW_AGE), f"p{q * 100:.0f}") for q in (0.5, 0.95)),
            Level(172_800, 259_200),
            runbook="ReftQuarantineOld",
        ),
        Panel(
            "Decisions, last day",
            "Rows approved and rejected by people.",
            Shown.NUMBER,
            (Line(LAST_DAY.increase(c.REVIEW_DECISIONS, "outcome"), "{{outcome}}"),),
        ),
        Panel(
            "Overturn rate, last day",
            "Share of reviewed rows that people approved: the live estimate of false positives.",
            Shown.SHARE,
            (Line(LAST_DAY.share(c.REVIEW_DECISIONS, outcome="approved")),),
            Level(0.1, 0.2),
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
