"""From a refusal score to a decision: thresholds, calibration, and the verdict on a row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from reft_ray.core.errors import ReftError


class Decision(StrEnum):
    """The decision on a row."""

    ALLOW = "allow"
    REVIEW = "review"
    BLOCK = "block"


class ScoreError(ReftError):
    """A scorer gave something that is not a score: there is no verdict."""


def finite(score: float) -> float:
    """The score. Raises ScoreError for NaN and infinities, which compare with thresholds but say nothing."""
    if not math.isfinite(score):
        raise ScoreError(f"a score is {score}: the model's weights or precision are broken, so it must be replaced")
    return score


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Cosine thresholds: `score > block` blocks, otherwise `score > review` needs review by a person."""

    review: float
    block: float

    def __post_init__(self) -> None:
        if not -1.0 <= self.review <= self.block <= 1.0:
            raise ValueError(
                f"thresholds need -1 <= review <= block <= 1, got review={self.review}, block={self.block}"
            )

    def raised(self, offset: float) -> Thresholds:
        """Both thresholds raised by an offset, to at most 1, at which nothing is withheld."""
        return Thresholds(min(1.0, self.review + offset), min(1.0, self.block + offset)) if offset else self

    def decide(self, score: float) -> Decision:
        """The decision for one refusal score. Raises ScoreError for one that is not finite."""
        if finite(score) > self.block:
            return Decision.BLOCK
        return Decision.REVIEW if score > self.review else Decision.ALLOW


@dataclass(frozen=True, slots=True)
class Calibration:
    """Platt scaling: P(harmful | score) = sigmoid(slope * score + intercept)."""

    slope: float
    intercept: float

    def probability(self, score: float) -> float:
        """Calibrated probability in [0, 1] that the text is harmful."""
        logit = self.slope * score + self.intercept
        return 1.0 / (1.0 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1.0 + math.exp(logit))


@dataclass(frozen=True, slots=True)
class Verdict:
    """The decision on one row, and its evidence.

    `score` is the highest refusal score of the row's parts and `part` names the part with it;
    `encoding` is that part's encoding (`base64`, `rot13`, ...), None for plain text; `threshold` is the block threshold
    that was applied to it; `windows` counts the windows scored over all parts. `span` has the first and last character
    (exclusive) of the window with the score, in that part; None where it is not known. `categories` and `hazards` are
    OpenAI's and MLCommons' names of the harm (`core.hazards`); the teacher itself has none. `asked` is the highest
    score of the parts that are not an assistant's; None where there is none, or a teacher over HTTP does not report it.
    """

    decision: Decision
    score: float
    probability: float
    threshold: float
    part: str
    encoding: str | None = None
    windows: int = 1
    truncated: bool = False
    span: tuple[int, int] | None = None
    categories: tuple[str, ...] = ()
    hazards: tuple[str, ...] = ()
    asked: float | None = None

    def score_as_prompt(self, offset: float) -> float | None:
        """The score of what was asked, else of the answer less its `offset`; None where no text was scored.

        Short answers to a task are alike and say nothing about what was asked.
        """
        if self.asked is not None:
            return self.asked
        return self.score - offset if self.windows else None

    @property
    def reason(self) -> str:
        """The reason, as a label of the telemetry catalogue."""
        if self.windows == 0:
            return "no_text"
        if self.decision is Decision.ALLOW:
            return "clear"
        if self.truncated and self.decision is Decision.REVIEW:
            return "truncated"
        return "encoded_text" if self.encoding else "refusal_score"
