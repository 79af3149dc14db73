"""The Finetuning dashboard: jobs and training."""

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

_TRAINING = Section(
    "Training",
    (
        Panel(
            "Tokens",
            "Training tokens per second, of user and alignment rows.",
            DisplayUnit.OPERATIONS_PER_SECOND,
            (Line(Q.rate(c.TRAIN_TOKENS, "stage", "rows"), "{{stage}} {{rows}}"),),
        ),
        Panel(
            "Rows",
            "Training rows per second; guided finetuning uses both user and alignment rows.",
            DisplayUnit.ROWS_PER_SECOND,
            (Line(Q.rate(c.TRAIN_ROWS, "stage", "rows"), "{{stage}} {{rows}}"),),
        ),
        Panel(
            "Loss terms",
            "Loss terms of the last step, mean over running jobs.",
            DisplayUnit.NUMBER,
            (Line(Q.gauge(c.TRAIN_LOSS, "stage", "term", how="avg"), "{{stage}} {{term}}"),),
            Thresholds(5, 10),
        ),
        Panel(
            "KL from teacher to student",
            "Nats per alignment token, maximum over jobs; an increase means that the student diverges.",
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
            "Training restarts after the loss of a worker.",
            DisplayUnit.NUMBER,
            (Line(zero_if_absent(LAST_DAY.increase(c.TRAIN_RESTARTS, "stage")), "{{stage}}"),),
            Thresholds(1, 3),
            runbook="ReftTrainingRestarts",
        ),
    ),
)

BOARD = Board("finetuning", "Finetuning", "Finetuning jobs and training metrics.", (_JOBS, _TRAINING))
