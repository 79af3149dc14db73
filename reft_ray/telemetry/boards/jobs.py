"""The Jobs dashboard: finetuning jobs from creation to release, and what each project used."""

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
)

_JOBS = Section(
    "Jobs",
    (
        Panel(
            "Unscreened rows in training, last day",
            "User rows that reached training without a verdict. Any value above 0 is a defect and pages.",
            DisplayUnit.NUMBER,
            (Line(LAST_DAY.increase_from_zero(c.UNSCREENED_ROWS)),),
            MUST_BE_ZERO,
            Chart.STAT,
            "ReftUnscreenedRows",
        ),
        Panel(
            "Jobs running",
            "Jobs with status `running`.",
            DisplayUnit.NUMBER,
            (Line(Q.shared_gauge(c.JOBS, "project", status="running")),),
            chart=Chart.STAT,
        ),
        Panel(
            "Jobs waiting",
            "Queued jobs; if none runs at the same time, the scheduler or the cluster is stuck.",
            DisplayUnit.NUMBER,
            (Line(Q.shared_gauge(c.JOBS, "project", status="queued")),),
            Thresholds(10, 50),
            Chart.STAT,
            "ReftJobsStuck",
        ),
        Panel(
            "Oldest queued job",
            "Waiting time of the oldest queued job, read from the job store.",
            DisplayUnit.SECONDS,
            (Line(Q.gauge(c.JOB_OLDEST_QUEUED)),),
            Thresholds(14_400, 43_200),
            Chart.STAT,
            "ReftJobsStuck",
        ),
        Panel(
            "Jobs by status",
            "Finetuning jobs in the store by status.",
            DisplayUnit.NUMBER,
            (Line(Q.shared_gauge(c.JOBS, "project", "status"), "{{status}}"),),
        ),
        Panel(
            "Transitions, last day",
            "Status transitions; `running` to `queued` is a restart.",
            DisplayUnit.NUMBER,
            (
                Line(
                    LAST_DAY.increase(c.JOB_TRANSITIONS, "from_status", "to_status"), "{{from_status}} to {{to_status}}"
                ),
            ),
        ),
        Panel(
            "Failures by code, last day",
            "Failed jobs by error code; `unsafe_training_data` means that the filter refused the data.",
            DisplayUnit.NUMBER,
            (Line(LAST_DAY.increase(c.JOB_FAILURES, "code"), "{{code}}"),),
            Thresholds(5, 20),
        ),
        Panel(
            "Queue time and job duration",
            "95th percentile of the time in the queue, and from creation to end by status.",
            DisplayUnit.SECONDS,
            (
                Line(Q.quantile(0.95, c.JOB_QUEUE_SECONDS), "queued"),
                Line(Q.quantile(0.95, c.JOB_SECONDS, "status"), "{{status}}"),
            ),
            Thresholds(14_400, 43_200),
            runbook="ReftJobsStuck",
        ),
    ),
)

_PROJECTS = Section(
    "Projects",
    (
        Panel(
            "Jobs by project",
            "Finetuning jobs in the store by project; one line `all` where the label `project` is switched off.",
            DisplayUnit.NUMBER,
            (Line(Q.gauge(c.JOBS, "project", "status", status="queued|running"), "{{project}} {{status}}"),),
        ),
        Panel(
            "Rows screened by project, last day",
            "Rows of the datasets that each project had screened: the teacher's share of its bill.",
            DisplayUnit.NUMBER,
            (Line(LAST_DAY.increase(c.SCREENING_ROWS, "project"), "{{project}}"),),
        ),
    ),
)

_TRAINING = Section(
    "Training API",
    (
        Panel(
            "Tokens without a verdict, last day",
            "Tokens of customers' loops whose gradient counted without a verdict. Any value above 0 is a defect.",
            DisplayUnit.NUMBER,
            (Line(LAST_DAY.increase_from_zero(c.TRAINING_TOKENS, content="unjudged")),),
            MUST_BE_ZERO,
            Chart.STAT,
        ),
        Panel(
            "Data by outcome",
            "Data of customers' loops per second: kept, withheld, or masked in part.",
            DisplayUnit.NUMBER,
            (Line(Q.rate(c.TRAINING_DATA, "outcome"), "{{outcome}}"),),
        ),
        Panel(
            "Tokens by content",
            "Tokens per second of customers' loops, of the teacher's guidance in them, and of their samples.",
            DisplayUnit.NUMBER,
            (Line(Q.rate(c.TRAINING_TOKENS, "content"), "{{content}}"),),
        ),
        Panel(
            "Requests by kind",
            "Requests per second that the training workers ended.",
            DisplayUnit.NUMBER,
            (Line(Q.rate(c.TRAINING_REQUESTS, "kind", "status"), "{{kind}} {{status}}"),),
        ),
        Panel(
            "Time of a request",
            "95th percentile of the time that a training worker spends on a request, by kind.",
            DisplayUnit.SECONDS,
            (Line(Q.quantile(0.95, c.TRAINING_REQUEST_SECONDS, "kind"), "{{kind}}"),),
        ),
    ),
)

BOARD = Board("jobs", "Jobs", "Finetuning jobs, and what each project uses.", (_JOBS, _PROJECTS, _TRAINING))
