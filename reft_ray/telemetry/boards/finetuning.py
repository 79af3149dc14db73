"""The Finetuning dashboard: training of teachers and students."""

from __future__ import annotations

from reft_ray.telemetry import catalog as c
from reft_ray.telemetry.panel import DASHBOARD as Q
from reft_ray.telemetry.panel import (
    LAST_DAY,
    Board,
    DisplayUnit,
    Line,
    Panel,
    Section,
    Thresholds,
    quantiles,
    zero_if_absent,
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
            quantiles(c.TRAIN_STEP_SECONDS, "stage", of=(0.5, 0.95)),
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

BOARD = Board("finetuning", "Finetuning", "Training metrics of teachers and students.", (_TRAINING,))
