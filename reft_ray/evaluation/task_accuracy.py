"""FA: the share of a task's test rows that are answered correctly."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from enum import StrEnum

from reft_ray.core.conversation import Example
from reft_ray.evaluation.answer_text import without_reasoning
from reft_ray.evaluation.intervals import Measure
from reft_ray.evaluation.judges import Respond

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


class Match(StrEnum):
    """How an answer is compared with the reference."""

    EXACT = "exact"
    """The same string but for surrounding white space."""
    LABEL = "label"
    """The same label, ignoring case; extra words are wrong (SST-2, AG News)."""
    NUMBER = "number"
    """The same final number: the one after `####`, else the last (GSM8K)."""


def final_number(text: str) -> Decimal | None:
    """The first number after the last `####`, else the last number of the text, without thousands separators."""
    head, marker, tail = text.rpartition("####")
    numbers = _NUMBER.findall(tail)
    if not numbers and marker:
        numbers = _NUMBER.findall(head)[-1:]
    if not numbers:
        return None
    return Decimal((numbers[0] if marker else numbers[-1]).replace(",", ""))


def _same_number(answer: str, reference: str) -> bool:
    expected = final_number(reference)
    if expected is None:
        raise ValueError("the reference answer of a number task holds no number")
    return final_number(answer) == expected


_COMPARE: dict[Match, Callable[[str, str], bool]] = {
    Match.EXACT: lambda answer, reference: answer.strip() == reference.strip(),
    Match.LABEL: lambda answer, reference: answer.strip().casefold() == reference.strip().casefold(),
    Match.NUMBER: _same_number,
}


def comparable(match: Match | str, reference: str) -> bool:
    """Whether answers can be compared with this reference."""
    return Match(match) is not Match.NUMBER or final_number(without_reasoning(reference)) is not None


def is_right(match: Match | str, answer: str, reference: str) -> bool:
    """Whether an answer agrees with the reference; both are compared without their reasoning."""
    return _COMPARE[Match(match)](without_reasoning(answer), without_reasoning(reference))


def task_accuracy(respond: Respond, rows: Sequence[Example], match: Match | str, seed: int = 0) -> Measure:
    """Answer the prompts of the rows and compare with the rows' answers."""
    answers = respond([row.prompt for row in rows])
    return Measure.of([is_right(match, answer, row.response) for answer, row in zip(answers, rows, strict=True)], seed)
