"""Record the verdicts of a batch of rows and the canary results of a teacher."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from reft_ray.telemetry import catalog
from reft_ray.telemetry.recorder import Recorder


def unit_score(cosine: float) -> float:
    """Map a cosine from [-1, 1] to (1 + cosine) / 2 in [0, 1]."""
    return min(1.0, max(0.0, (1.0 + cosine) / 2.0))


def record_verdicts(
    recorder: Recorder,
    decisions: Sequence[str],
    reasons: Sequence[str],
    scores: Sequence[float],
    *,
    stream: str,
    policy: str,
    teacher: str,
) -> None:
    """Count decisions by reason and observe refusal scores (cosines); the sequences have one item per row."""
    for (decision, reason), rows in Counter(zip(decisions, reasons, strict=True)).items():
        recorder.count(
            catalog.FILTER_ROWS, rows, decision=decision, reason=reason, policy=policy, stream=stream, teacher=teacher
        )
    for score in scores:
        recorder.observe(catalog.FILTER_SCORE, unit_score(score), stream=stream, teacher=teacher)


def record_canaries(recorder: Recorder, harmful: Sequence[str], harmless: Sequence[str], *, teacher: str) -> None:
    """Set a teacher's canary recall and false positive ratio from its decisions on the canary prompts."""
    if not harmful or not harmless:
        raise ValueError(f"teacher {teacher} needs harmful and harmless canary prompts")
    for metric, decisions in (
        (catalog.FILTER_CANARY_RECALL, harmful),
        (catalog.FILTER_CANARY_FALSE_POSITIVES, harmless),
    ):
        held = sum(decision != "allow" for decision in decisions)
        recorder.set(metric, held / len(decisions), teacher=teacher)


def clear_canaries(recorder: Recorder, teacher: str) -> None:
    """Remove the canary gauges of a teacher that is no longer served."""
    for metric in (catalog.FILTER_CANARY_RECALL, catalog.FILTER_CANARY_FALSE_POSITIVES):
        recorder.set(metric, None, teacher=teacher)
