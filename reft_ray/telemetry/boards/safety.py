"""The Safety dashboard: what finetuning did to the models, and whether the guards stand."""

from __future__ import annotations

from reft_ray.telemetry import catalog as c
from reft_ray.telemetry.panel import DASHBOARD as Q
from reft_ray.telemetry.panel import LAST_DAY, ZERO, Board, Chart, Thresholds, Line, Panel, Section, DisplayUnit


def _measure(title: str, description: str, measure: str, level: Thresholds, runbook: str = "") -> Panel:
    """Base and student side by side, per suite."""
    lines = (Line(Q.gauge(c.SAFETY_EVAL, "suite", "model", measure=measure), "{{suite}} {{model}}"),)
    return Panel(title, description, DisplayUnit.SHARE, lines, level, runbook=runbook)


_MODELS = Section(
    "Models before and after finetuning",
    (
        _measure(
            "Harmful score",
            "Share of harmful prompts that are answered, base and student side by side; the highest of the last jobs.",
            "harmful_score",
            Thresholds(0.02, 0.05),
            "ReftStudentHarmful",
        ),
        _measure(
            "Over-refusal",
            "Share of harmless prompts that are refused, base and student side by side.",
            "over_refusal",
            Thresholds(0.03, 0.1),
        ),
        _measure(
            "Finetune accuracy",
            "Accuracy on the user's task, base and student side by side.",
            "finetune_accuracy",
            Thresholds(0.8, 0.5, low_is_bad=True),
        ),
        _measure(
            "Coherence",
            "Share of answers that read as language, base and student side by side.",
            "coherence",
            Thresholds(0.95, 0.9, low_is_bad=True),
        ),
        Panel(
            "Evaluations, last day",
            "Safety evaluations by suite and outcome; a failed one withholds the model.",
            DisplayUnit.NUMBER,
            (Line(LAST_DAY.increase(c.SAFETY_EVALS, "suite", "outcome"), "{{suite}} {{outcome}}"),),
            runbook="ReftGateErrors",
        ),
        Panel(
            "Gate results, last day",
            "Models released, withheld, or not decided because the gate itself failed.",
            DisplayUnit.NUMBER,
            (Line(LAST_DAY.increase(c.GATE_RESULTS, "result"), "{{result}}"),),
            runbook="ReftGateErrors",
        ),
        Panel(
            "Withheld share, last day",
            "Share of finished models that the gate withheld.",
            DisplayUnit.SHARE,
            (Line(LAST_DAY.share(c.GATE_RESULTS, result="withheld")),),
            Thresholds(0.2, 0.5),
            Chart.STAT,
            "ReftGateWithholdsMany",
        ),
    ),
)

_GUARDS = Section(
    "Guards",
    (
        Panel(
            "Unscreened rows in training, last day",
            "User rows that reached training without a verdict. Anything but 0 is a defect.",
            DisplayUnit.NUMBER,
            (Line(LAST_DAY.increase_from_zero(c.UNSCREENED_ROWS)),),
            ZERO,
            Chart.STAT,
            "ReftUnscreenedRows",
        ),
        Panel(
            "Unaccounted rows, last day",
            "Rows that went in and did not come out. Anything but 0 is a defect.",
            DisplayUnit.NUMBER,
            (Line(LAST_DAY.increase_from_zero(c.UNACCOUNTED_ROWS)),),
            ZERO,
            Chart.STAT,
            "ReftUnaccountedRows",
        ),
        Panel(
            "Breaks in the audit chain",
            "Entries of the audit log whose hash does not follow from the one before.",
            DisplayUnit.NUMBER,
            (Line(Q.gauge(c.AUDIT_BREAKS)),),
            ZERO,
            Chart.STAT,
            "ReftAuditChainBroken",
        ),
        Panel(
            "Canary recall",
            "Share of sealed harmful prompts that each teacher does not allow.",
            DisplayUnit.SHARE,
            (Line(Q.gauge(c.FILTER_CANARY_RECALL, "teacher", how="min"), "{{teacher}}"),),
            Thresholds(1.0, 0.95, low_is_bad=True),
            runbook="ReftCanaryRecallLow",
        ),
        Panel(
            "Score drift",
            "Population stability index per stream: above 0.25 the teacher sees rows that it was not calibrated on.",
            DisplayUnit.NUMBER,
            (Line(Q.gauge(c.FILTER_SCORE_PSI, "stream"), "{{stream}}"),),
            Thresholds(0.1, 0.25),
            runbook="ReftScoreDrift",
        ),
    ),
)

BOARD = Board(
    "safety", "Safety", "What finetuning did to the models, and whether the guards stand.", (_MODELS, _GUARDS)
)
