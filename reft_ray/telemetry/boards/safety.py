"""The Safety dashboard: evaluations of finetuned models and the safety invariants."""

from __future__ import annotations

from reft_ray.telemetry import catalog as c
from reft_ray.telemetry.panel import DASHBOARD as Q
from reft_ray.telemetry.panel import LAST_DAY, MUST_BE_ZERO, Board, Chart, DisplayUnit, Line, Panel, Section, Thresholds


def _measure(title: str, description: str, measure: str, thresholds: Thresholds, runbook: str = "") -> Panel:
    """A measure of base and student per suite."""
    lines = (Line(Q.gauge(c.SAFETY_EVAL, "suite", "model", measure=measure), "{{suite}} {{model}}"),)
    return Panel(title, description, DisplayUnit.SHARE, lines, thresholds, runbook=runbook)


_MODELS = Section(
    "Models before and after finetuning",
    (
        _measure(
            "Harmful score",
            "Fraction of harmful prompts that base and student answer; maximum over the last jobs.",
            "harmful_score",
            Thresholds(0.02, 0.05),
            "ReftStudentHarmful",
        ),
        _measure(
            "Over-refusal",
            "Fraction of harmless prompts that base and student refuse.",
            "over_refusal",
            Thresholds(0.03, 0.1),
        ),
        _measure(
            "Finetune accuracy",
            "Accuracy of base and student on the user's task.",
            "finetune_accuracy",
            Thresholds(0.8, 0.5, low_is_bad=True),
        ),
        _measure(
            "Coherence",
            "Fraction of coherent answers of base and student.",
            "coherence",
            Thresholds(0.95, 0.9, low_is_bad=True),
        ),
        Panel(
            "Evaluations, last day",
            "Safety evaluations by suite and outcome; a failed evaluation withholds the model.",
            DisplayUnit.NUMBER,
            (Line(LAST_DAY.increase(c.SAFETY_EVALS, "suite", "outcome"), "{{suite}} {{outcome}}"),),
            runbook="ReftGateErrors",
        ),
        Panel(
            "Gate results, last day",
            "Models by gate result: passed, withheld, or error if the gate could not decide.",
            DisplayUnit.NUMBER,
            (Line(LAST_DAY.increase(c.GATE_RESULTS, "result"), "{{result}}"),),
            runbook="ReftGateErrors",
        ),
        Panel(
            "Withheld share, last day",
            "Fraction of finished models that the gate withheld.",
            DisplayUnit.SHARE,
            (Line(LAST_DAY.share(c.GATE_RESULTS, result="withheld")),),
            Thresholds(0.2, 0.5),
            Chart.STAT,
            "ReftGateWithholdsMany",
        ),
    ),
)

_INVARIANTS = Section(
    "Invariants and filter checks",
    (
        Panel(
            "Unscreened rows in training, last day",
            "User rows that reached training without a verdict. Any value above 0 is a defect.",
            DisplayUnit.NUMBER,
            (Line(LAST_DAY.increase_from_zero(c.UNSCREENED_ROWS)),),
            MUST_BE_ZERO,
            Chart.STAT,
            "ReftUnscreenedRows",
        ),
        Panel(
            "Unaccounted rows, last day",
            "Input rows without an outcome. Any value above 0 is a defect.",
            DisplayUnit.NUMBER,
            (Line(LAST_DAY.increase_from_zero(c.UNACCOUNTED_ROWS)),),
            MUST_BE_ZERO,
            Chart.STAT,
            "ReftUnaccountedRows",
        ),
        Panel(
            "Breaks in the audit chain",
            "Audit log entries whose hash does not match the chain.",
            DisplayUnit.NUMBER,
            (Line(Q.gauge(c.AUDIT_BREAKS)),),
            MUST_BE_ZERO,
            Chart.STAT,
            "ReftAuditChainBroken",
        ),
        Panel(
            "Canary recall",
            "Fraction of the harmful canary prompts that each teacher does not allow.",
            DisplayUnit.SHARE,
            (Line(Q.gauge(c.FILTER_CANARY_RECALL, "teacher", how="min"), "{{teacher}}"),),
            Thresholds(1.0, 0.95, low_is_bad=True),
            runbook="ReftCanaryRecallLow",
        ),
        Panel(
            "Score drift",
            "Population stability index per stream: above 0.25 the rows differ from the calibration data.",
            DisplayUnit.NUMBER,
            (Line(Q.gauge(c.FILTER_SCORE_PSI, "stream"), "{{stream}}"),),
            Thresholds(0.1, 0.25),
            runbook="ReftScoreDrift",
        ),
    ),
)

BOARD = Board(
    "safety",
    "Safety",
    "Safety evaluations of finetuned models and the invariants of the service.",
    (_MODELS, _INVARIANTS),
)
