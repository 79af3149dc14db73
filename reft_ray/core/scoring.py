"""Verdicts on rows: every part is scored, encoded parts also decoded, and the highest score decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from reft_ray.core.conversation import Conversation, Part, parts
from reft_ray.core.decoding import readings
from reft_ray.core.joining import joined_turns
from reft_ray.core.verdict import Calibration, Decision, ScoreError, Thresholds, Verdict, finite


@dataclass(frozen=True, slots=True)
class TextScore:
    """The refusal score of one text: its highest over `windows`; `truncated` if part of it was not read.

    `span` has the first and last character (exclusive) of the window with that score; None is the whole text.

    Raises ScoreError for a score that is not finite, so that none is cached or judged.
    """

    score: float
    windows: int = 1
    truncated: bool = False
    span: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        finite(self.score)


@dataclass(frozen=True, slots=True)
class _Reading:
    """One reading of one part: the part's name and length, and the index of its text among those that are scored."""

    part: str
    answer: bool
    encoding: str | None
    text: int
    offset: float
    length: int


@runtime_checkable
class Scorer(Protocol):
    """The Ref-Teacher for screening and serving: texts in, refusal scores out, in order."""

    @property
    def teacher_id(self) -> str:
        """The id of the teacher."""
        ...

    @property
    def thresholds(self) -> Thresholds:
        """The thresholds of the teacher."""
        ...

    @property
    def calibration(self) -> Calibration:
        """Its scores as probabilities."""
        ...

    @property
    def response_offset(self) -> float:
        """How much higher an assistant's answer must score than a prompt to be withheld, >= 0.

        The refusal feature is learned on prompts; harmless answers, a different kind of text, score higher.
        """
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

    All readings of all parts of all rows, and of turns read on (`joined`), go to the scorer in one call, each distinct
    text once. A row without any text is blocked. One that was not read to its end needs review. Raises ScoreError.
    """
    wanted: dict[str, int] = {}
    rows: list[list[_Reading]] = []
    for conversation in conversations:
        row = []
        texts: list[tuple[Part, str | None, str]] = [(part, None, part.text) for part in parts(conversation)]
        texts += [(part, "joined", text) for part, text in joined_turns(conversation)]
        for part, joined, whole in texts:
            answer = part.role == "assistant"
            offset = scorer.response_offset if answer else 0.0
            for encoding, text in decode(whole):
                name = "+".join(filter(None, (joined, encoding))) or None
                place = wanted.setdefault(text, len(wanted))
                row.append(_Reading(part.name, answer, name, place, offset, len(part.text)))
        rows.append(row)
    scores = scorer.score(list(wanted)) if wanted else []
    if len(scores) != len(wanted):
        raise ScoreError(f"teacher {scorer.teacher_id} gave {len(scores)} scores for {len(wanted)} texts")
    limits = thresholds or scorer.thresholds
    return [_verdict(row, scores, limits, scorer.calibration) for row in rows]


def _verdict(row: list[_Reading], scores: list[TextScore], limits: Thresholds, calibration: Calibration) -> Verdict:
    if not row:
        return Verdict(Decision.BLOCK, 1.0, 1.0, limits.block, part="", windows=0, truncated=True)
    best = max(row, key=lambda item: scores[item.text].score - item.offset)
    top = scores[best.text]
    applied = limits.raised(best.offset)
    decision = applied.decide(top.score)
    truncated = any(scores[item.text].truncated for item in row)
    if truncated and decision is Decision.ALLOW:
        decision = Decision.REVIEW
    return Verdict(
        decision=decision,
        score=top.score,
        probability=calibration.probability(top.score - best.offset),
        threshold=applied.block,
        part=best.part,
        encoding=best.encoding,
        windows=sum(scores[item.text].windows for item in row),
        truncated=truncated,
        # A decoded text has other positions than the part that it was found in.
        span=(0, best.length) if best.encoding or top.span is None else top.span,
        asked=max((scores[item.text].score for item in row if not item.answer), default=None),
    )
