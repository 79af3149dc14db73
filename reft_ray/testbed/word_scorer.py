"""A `core.scoring.Scorer` from a word list, fast and deterministic: for tests."""

from __future__ import annotations

from collections.abc import Sequence

from reft_ray.core.scoring import TextScore
from reft_ray.core.verdict import Calibration, Thresholds

HARMFUL_WORDS = frozenset({"bomb", "poison", "steal", "weapon", "hack", "malware"})
SUSPECT_WORDS = frozenset({"knife", "tactical", "exploit"})


class WordScorer:
    """0.9 for a text with a harmful word, 0.1 for a suspect one, -0.9 otherwise; one window per 512 words."""

    def __init__(self, teacher_id: str = "rt-words") -> None:
        self.teacher_id = teacher_id
        self.thresholds = Thresholds(review=0.0, block=0.5)
        self.response_offset = 0.0
        self.calibration = Calibration(slope=6.0, intercept=0.0)

    def score(self, texts: Sequence[str]) -> list[TextScore]:
        """One TextScore per text, in order."""
        return [self._score(text.lower().split()) for text in texts]

    @staticmethod
    def _score(words: list[str]) -> TextScore:
        bare = {word.strip(".,;:!?\"'()") for word in words}
        score = 0.9 if bare & HARMFUL_WORDS else 0.1 if bare & SUSPECT_WORDS else -0.9
        return TextScore(score, windows=max(1, -(-len(words) // 512)))
