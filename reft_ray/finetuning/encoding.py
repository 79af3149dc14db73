"""Rows as the tokens that a run learns from; rows that cannot be encoded are counted, with the error of the first."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from reft_ray.core.batch import TokenizedExample, answered, numbered
from reft_ray.core.conversation import Conversation, Example
from reft_ray.core.errors import ReftError
from reft_ray.hf.chat import ChatFormat
from reft_ray.rows.text import conversation_from

Sequences = Callable[[Example], list[TokenizedExample]]
"""A row to its sequences. Raises ReftError for a row that does not fit or render."""


@dataclass(frozen=True, slots=True)
class TokenisedRow:
    """A row whose sequences were made by Ray Data, or its error.

    Of each sequence (tokens [T], which are learned [T], the last index of its prompt), as arrays: a run holds thousands
    of rows to shuffle them.
    """

    place: str
    arrays: Sequence[tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_], int]]
    error: str | None = None

    def sequences(self) -> list[TokenizedExample]:
        """The row's sequences. Raises ReftError with its error."""
        if self.error is not None:
            raise ReftError(self.error)
        return [TokenizedExample(ids_T.tolist(), mask_T.tolist(), end) for ids_T, mask_T, end in self.arrays]


Row = Example | TokenisedRow
R = TypeVar("R", bound=Row)


@dataclass(slots=True)
class SkippedRows:
    """Rows that are left out, with a prompt that does not fit the context or a turn that the chat template does not
    render: how many, and the error of the first."""

    count: int = 0
    first: str = ""

    def add(self, row: Row, error: ReftError) -> None:
        """Count one more."""
        self.count += 1
        self.first = self.first or (f"{row.place}: {error}" if row.place else str(error))

    @property
    def note(self) -> str:
        """One line for the user, or an empty string."""
        others = f", and {self.count - 1} more" if self.count > 1 else ""
        return f"{self.first}: left out{others}" if self.count else ""


@dataclass(frozen=True, slots=True)
class Fitted:
    """Rows that fit, as tokens, and for each of these sequences the row as read."""

    rows: list[Example]
    encoded: list[TokenizedExample]
    skipped: SkippedRows = field(default_factory=SkippedRows)


def answers_of(chat: ChatFormat, max_tokens: int | None) -> Sequences:
    """Every answer of a dialogue is learned, in as many sequences as its template needs (`ChatFormat.sequences`).

    A prompt must leave space for an answer within `max_tokens`; a longer answer is cut.
    """
    return lambda row: chat.sequences(row, max_tokens=max_tokens)


def pairs_of(chat: ChatFormat, max_tokens: int | None) -> Sequences:
    """The chosen and the rejected dialogue of a preference pair: sequences 2 i and 2 i + 1 of a batch."""
    return lambda row: [chat.encode(side, max_tokens=max_tokens) for side in pair_of(row)]


def encode(sequences: Sequences, rows: Sequence[Row], skipped: SkippedRows) -> list[TokenizedExample]:
    """The sequences of rows, numbered in order; rows without any are counted."""
    return [sequence for _, sequence in _encoded(sequences, rows, skipped)]


def encode_rows(
    chat: ChatFormat, rows: Sequence[Example], max_tokens: int | None, skipped: SkippedRows | None = None
) -> Fitted:
    """Encode the answers of the rows that fit. Pass `skipped` to count over several calls."""
    fitted = Fitted([], [], SkippedRows() if skipped is None else skipped)
    for row, sequence in _encoded(answers_of(chat, max_tokens), rows, fitted.skipped):
        fitted.rows.append(row)
        fitted.encoded.append(sequence)
    return fitted


def _encoded(sequences: Sequences, rows: Sequence[R], skipped: SkippedRows) -> Iterator[tuple[R, TokenizedExample]]:
    index = itertools.count()
    for row in rows:
        try:
            found = row.sequences() if isinstance(row, TokenisedRow) else sequences(row)
        except ReftError as error:
            skipped.add(row, error)
            continue
        for sequence in found:
            yield row, replace(sequence, index=next(index))


def alignment_rows(
    chat: ChatFormat, alignment: Sequence[Example], max_tokens: int
) -> tuple[list[TokenizedExample], SkippedRows]:
    """The alignment rows with answers to learn, as tokens; soft labels are stored by their place among these."""
    fitted = encode_rows(chat, alignment, max_tokens)
    return numbered(answered(fitted.encoded)), fitted.skipped


def pair_of(row: Example) -> tuple[Example, Example]:
    """A row's two dialogues; only the answers in which they differ are learned. Raises ReftError without a pair."""
    rejected = conversation_from(row.rejected)
    if not rejected or not row.answered or rejected[-1].role != "assistant":
        raise ReftError("the row is not a preference pair: it has no rejected answer")
    shared = 0
    while shared < min(len(row.messages), len(rejected)) and _same(row.messages[shared], rejected[shared]):
        shared += 1
    if shared == max(len(row.messages), len(rejected)):
        raise ReftError("the chosen and the rejected answer of the pair are the same")

    def learned(turns: Conversation) -> Example:
        before = (replace(turn, trained=False) for turn in turns[:shared])
        return replace(row, messages=(*before, *turns[shared:]))

    return learned(row.messages), learned(rejected)


def _same(one: object, other: object) -> bool:
    names = ("role", "content", "calls")
    return all(getattr(one, name) == getattr(other, name) for name in names)
