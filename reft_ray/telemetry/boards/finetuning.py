"""The Finetuning dashboard: jobs, and what happens inside training."""

from __future__ import annotations

from reft_ray.telemetry import catalog as c
from reft_ray.telemetry.panel import DASHBOARD as Q
from reft_ray.telemetry.panel import LAST_DAY, ZERO, Board, Chart, Thresholds, Line, Panel, Section, DisplayUnit, zero_if_absent

_JOBS = Section(
    "Jobs",
    (
        Panel(
            "Unscreened rows in training, last day",
            "User rows that reached training without a verdict. Anything but 0 is a defect and pages someone.",
            DisplayUnit.NUMBER,
            (Line(LAST_DAY.increase_from_zero(c.UNSCREENED_ROWS)),),
            ZERO,
            Chart.STAT,
            "ReftUnscreenedRows",
        ),
        Panel(
            "Jobs running",
            "Jobs that train now.",
            DisplayUnit.NUMBER,
            (Line(Q.shared_gauge(c.JOBS, "project", status="running")),),
            chart=Chart.STAT,
        ),
        Panel(
            "Jobs waiting",
            "Jobs that are queued; waiting while nothing runs means that the scheduler or the cluster is stuck.",
            DisplayUnit.NUMBER,
            (Line(Q.shared_gauge(c.JOBS, "project", status="queued")),),
            Thresholds(10, 50),
            Chart.STAT,
            "ReftJobsStuck",
        ),
        Panel(
            "Head of the queue",
            "Time that the oldest queued job has waited; it survives restarts, because the job store tells it.",
            DisplayUnit.SECONDS,
            (Line(Q.gauge(c.JOB_OLDEST_QUEUED)),),
            Thresholds(14_400, 43_200),
            Chart.STAT,
            "ReftJobsStuck",
        ),
        Panel(
            "Jobs by status",
            "All finetuning jobs in the store, by status.",
            DisplayUnit.NUMBER,
            (Line(Q.shared_gauge(c.JOBS, "project", "status"), "{{status}}"),),
        ),
        Panel(
            "Transitions, last day",
            "Changes of status; anything from `running` to `queued` is a restart.",
            DisplayUnit.NUMBER,
            (
                Line(
                    LAST_DAY.increase(c.JOB_TRANSITIONS, "from_status", "to_status"), "{{from_status}} to {{to_status}}"
                ),
            ),
        ),
        Panel(
            "Failures by code, last day",
            "Why jobs failed; `unsafe_training_data` is the filter at work.",
            DisplayUnit.NUMBER,
            (Line(LAST_DAY.increase(c.JOB_FAILURES, "code"), "{{code}}"),),
            Thresholds(5, 20),
        ),
        Panel(
            "Waiting and whole time",
            "95th percentile of the time in the queue, and from creation to the end by status.",
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

_TRAINING = Section(
    "Training",
    (
        Panel(
            "Tokens",
            "Tokens per second trained on, user and alignment rows apart.",
            DisplayUnit.OPERATIONS_PER_SECOND,
            (Line(Q.rate(c.TRAIN_TOKENS, "stage", "rows"), "{{stage}} {{rows}}"),),
        ),
        Panel(
            "Rows",
            "Rows per second trained on; guided finetuning needs both kinds.",
            DisplayUnit.ROWS_PER_SECOND,
            (Line(Q.rate(c.TRAIN_ROWS, "stage", "rows"), "{{stage}} {{rows}}"),),
        ),
        Panel(
            "Loss terms",
            "Mean over running jobs of the last step's loss terms.",
            DisplayUnit.NUMBER,
            (Line(Q.gauge(c.TRAIN_LOSS, "stage", "term", how="avg"), "{{stage}} {{term}}"),),
            Thresholds(5, 10),
        ),
        Panel(
            "KL from teacher to student",
            "In nats per alignment token; rising over a job means that the student leaves the teacher.",
            DisplayUnit.NUMBER,
            (Line(Q.gauge(c.TRAIN_KL), "worst job"),),
            Thresholds(0.5, 1),
            runbook="ReftStudentHarmful",
        ),
        Panel(
            "Step time",
            "Median and 95th percentile of one optimizer step.",
            DisplayUnit.SECONDS,
            tuple(
                Line(Q.quantile(q, c.TRAIN_STEP_SECONDS, "stage"), f"p{q * 100:.0f} {{{{stage}}}}") for q in (0.5, 0.95)
            ),
            Thresholds(10, 30),
        ),
        Panel(
            "Worker restarts, last day",
            "Times that training went on after losing a worker.",
            DisplayUnit.NUMBER,
            (Line(zero_if_absent(LAST_DAY.increase(c.TRAIN_RESTARTS, "stage")), "{{stage}}"),),
            Thresholds(1, 3),
            runbook="ReftTrainingRestarts",
        ),
    ),
)

BOARD = Board("finetuning", "Finetuning", "Finetuning jobs and what happens inside training.", (_JOBS, _TRAINING))
