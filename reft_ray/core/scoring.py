"""Judging rows: every part is scored, decoded where it is encoded, and the highest score decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from reft_ray.core.conversation import Conversation, parts
from reft_ray.core.decoding import readings
from reft_ray.core.verdict import Calibration, Decision, Thresholds, Verdict


@dataclass(frozen=True, slots=True)
class TextScore:
    """The refusal score of one text: its highest over `windows`; `truncated` when some of it went unread."""

    score: float
    windows: int = 1
    truncated: bool = False


@runtime_checkable
class Scorer(Protocol):
    """What the Ref-Teacher is to screening and serving: texts in, refusal scores out, in order."""

    @property
    def teacher_id(self) -> str:
        """Which teacher scores."""
        ...

    @property
    def thresholds(self) -> Thresholds:
        """Its own thresholds."""
        ...

    @property
    def calibration(self) -> Calibration:
        """Its score as a probability."""
        ...

    def score(self, texts: Sequence[str]) -> list[TextScore]:
        """One TextScore per text, each independent of the others in the call."""
        ...


def judge(
    scorer: Scorer,
    conversations: Sequence[Conversation],
    thresholds: Thresholds | None = None,
    decode: Callable[[str], list[tuple[str | None, str]]] = readings,
) -> list[Verdict]:
    """Verdicts on rows, in order.

    All readings of all parts of all rows go to the scorer in one call, each distinct text once. A row without
    any text is blocked: nothing was seen that could allow it.
    """
    wanted: dict[str, int] = {}
    rows: list[list[tuple[str, str | None, int]]] = []
    for conversation in conversations:
        row = []
        for part in parts(conversation):
            for encoding, text in decode(part.text):
                row.append((part.name, encoding, wanted.setdefault(text, len(wanted))))
        rows.append(row)
    scores = scorer.score(list(wanted)) if wanted else []
    limits = thresholds or scorer.thresholds
    return [_verdict(row, scores, limits, scorer.calibration) for row in rows]


def _verdict(
    row: list[tuple[str, str | None, int]], scores: list[TextScore], limits: Thresholds, calibration: Calibration
) -> Verdict:
    if not row:
        return Verdict(Decision.BLOCK, 1.0, 1.0, limits.block, part="", windows=0, truncated=True)
    name, encoding, index = max(row, key=lambda item: scores[item[2]].score)
    top = scores[index]
    return Verdict(
        decision=limits.decide(top.score),
        score=top.score,
        probability=calibration.probability(top.score),
        threshold=limits.block,
        part=name,
        encoding=encoding,
        windows=sum(scores[item[2]].windows for item in row),
        truncated=any(scores[item[2]].truncated for item in row),
    )
