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


def record_rows(
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
