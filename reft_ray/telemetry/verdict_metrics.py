"""Recording judged rows a batch at a time, the same way from every stream."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from reft_ray.telemetry import catalog
from reft_ray.telemetry.recorder import Recorder


def unit_score(cosine: float) -> float:
    """A cosine in [-1, 1] as (1 + cosine) / 2 in [0, 1]; what is not a number counts as 1, for it blocks."""
    return 1.0 if math.isnan(cosine) else min(1.0, max(0.0, (1.0 + cosine) / 2.0))


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
    """Count a batch's decisions by reason and observe its refusal scores (cosines), one of each per row."""
    for (decision, reason), rows in Counter(zip(decisions, reasons, strict=True)).items():
        recorder.count(
            catalog.FILTER_ROWS, rows, decision=decision, reason=reason, policy=policy, stream=stream, teacher=teacher
        )
    for score in scores:
        recorder.observe(catalog.FILTER_SCORE, unit_score(score), stream=stream, teacher=teacher)


def record_canaries(recorder: Recorder, harmful: Sequence[str], harmless: Sequence[str], *, teacher: str) -> None:
    """Set a teacher's canary recall and false positives from its decisions on the sealed prompt pairs."""
    if not harmful or not harmless:
        raise ValueError(f"canaries of teacher {teacher} need harmful and harmless prompts")
    for metric, decisions in (
        (catalog.FILTER_CANARY_RECALL, harmful),
        (catalog.FILTER_CANARY_FALSE_POSITIVES, harmless),
    ):
        held = sum(decision != "allow" for decision in decisions)
        recorder.set(metric, held / len(decisions), teacher=teacher)


def clear_canaries(recorder: Recorder, teacher: str) -> None:
    """Forget the canary gauges of a teacher that no longer answers."""
    for metric in (catalog.FILTER_CANARY_RECALL, catalog.FILTER_CANARY_FALSE_POSITIVES):
        recorder.set(metric, None, teacher=teacher)
