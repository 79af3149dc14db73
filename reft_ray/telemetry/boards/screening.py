"""The Screening dashboard: datasets and findings."""

from __future__ import annotations

from reft_ray.telemetry import catalog as c
from reft_ray.telemetry.panel import DASHBOARD as Q
from reft_ray.telemetry.panel import (
    LAST_DAY,
    MUST_BE_ZERO,
    Board,
    Chart,
    DisplayUnit,
    Line,
    Panel,
    Section,
    Thresholds,
    zero_if_absent,
)

_DATASETS = Section(
    "Datasets",
    (
        Panel(
            "Unaccounted rows, last day",
            "Input rows without an outcome. Any value above 0 is a defect and pages.",
            DisplayUnit.NUMBER,
            (Line(LAST_DAY.increase_from_zero(c.UNACCOUNTED_ROWS)),),
            MUST_BE_ZERO,
            Chart.STAT,
            "ReftUnaccountedRows",
        ),
        Panel(
            "Rows screened",
            "Dataset rows screened per second, all outcomes.",
            DisplayUnit.ROWS_PER_SECOND,
            (Line(Q.rate(c.SCREENING_ROWS)),),
            chart=Chart.STAT,
        ),
        Panel(
            "Bytes read",
            "Dataset bytes read per second.",
            DisplayUnit.BYTES_PER_SECOND,
            (Line(Q.rate(c.SCREENING_BYTES)),),
            chart=Chart.STAT,
        ),
        Panel(
            "Rows by outcome",
            "Rows per second that were kept, held for review, blocked and invalid.",
            DisplayUnit.ROWS_PER_SECOND,
            (Line(Q.rate(c.SCREENING_ROWS, "outcome"), "{{outcome}}"),),
        ),
        Panel(
            "Screenings ended, last day",
            "Finished screenings by policy and outcome; `refused` means above the maximum reject ratio.",
            DisplayUnit.NUMBER,
            (Line(LAST_DAY.increase(c.SCREENING_DATASETS, "policy", "outcome"), "{{policy}} {{outcome}}"),),
        ),
        Panel(
            "Time per dataset",
            "95th percentile by size; the objective for small datasets (up to 100,000 rows) is 10 minutes.",
            DisplayUnit.SECONDS,
            (Line(Q.quantile(0.95, c.SCREENING_SECONDS, "size"), "{{size}}"),),
            Thresholds(450, 600),
            runbook="ReftScreeningFreshnessBurn",
        ),
    ),
)

_CONTENT = Section(
    "Findings and invalid rows",
    (
        Panel(
            "Findings, last day",
            "Dataset-level findings: near-duplicates, identity prompts, refuse-then-comply answers and others.",
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
            "Rows per second that failed validation; a jump of one code usually means a changed client export.",
            DisplayUnit.ROWS_PER_SECOND,
            (Line(Q.rate(c.SCREENING_INVALID, "code"), "{{code}}"),),
            Thresholds(10, 100),
        ),
        Panel(
            "Unaccounted rows by location",
            "Where rows were lost.",
            DisplayUnit.NUMBER,
            (Line(f"{LAST_DAY.increase(c.UNACCOUNTED_ROWS, 'where')} or vector(0)", "{{where}}"),),
            MUST_BE_ZERO,
            runbook="ReftUnaccountedRows",
        ),
    ),
)

BOARD = Board("screening", "Screening", "Datasets, findings and invalid rows.", (_DATASETS, _CONTENT))
