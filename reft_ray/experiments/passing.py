"""The scorer of methods without a filter: rows are still read, validated and counted."""

from __future__ import annotations

from collections.abc import Sequence

from reft_ray.core.scoring import TextScore
from reft_ray.core.verdict import Calibration, Thresholds


class PassingScorer:
    """Lets every text pass."""

    teacher_id = "none"
    thresholds = Thresholds(1.0, 1.0)
    calibration = Calibration(0.0, -30.0)
    response_offset = 0.0

    def score(self, texts: Sequence[str]) -> list[TextScore]:
        """The lowest score for each text."""
        return [TextScore(-1.0) for _ in texts]
