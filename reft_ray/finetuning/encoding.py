"""Rows -> tokens: a row whose prompt does not fit the context is left out, counted and named, and the run goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from reft_ray.core.batch import TokenizedExample, answered, numbered
from reft_ray.core.conversation import Example
from reft_ray.core.errors import PromptTooLongError
from reft_ray.hf.chat import ChatFormat


@dataclass(slots=True)
class SkippedRows:
    """The rows that did not fit: how many, and what is wrong with the first."""

    count: int = 0
    first: str = ""

    def add(self, row: Example, error: PromptTooLongError) -> None:
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
    """Rows that fit, and the same as tokens."""

    rows: list[Example]
    encoded: list[TokenizedExample]
    skipped: SkippedRows = field(default_factory=SkippedRows)


def encode_rows(
    chat: ChatFormat, rows: Sequence[Example], max_tokens: int | None, skipped: SkippedRows | None = None
) -> Fitted:
    """Encode the rows whose prompt leaves room for an answer within `max_tokens`; a longer answer is cut.

    Tokens are numbered by their row's place among those that fit. Pass `skipped` to count over several calls.
    """
    fitted = Fitted([], [], SkippedRows() if skipped is None else skipped)
    for row in rows:
        try:
            encoded = chat.encode(row, len(fitted.rows), max_tokens)
        except PromptTooLongError as error:
            fitted.skipped.add(row, error)
            continue
        fitted.rows.append(row)
        fitted.encoded.append(encoded)
    return fitted


def alignment_rows(
    chat: ChatFormat, alignment: Sequence[Example], max_tokens: int
) -> tuple[list[TokenizedExample], SkippedRows]:
    """The alignment rows with answers to learn, as tokens; soft labels are stored by their place among these."""
    fitted = encode_rows(chat, alignment, max_tokens)
    return numbered(answered(fitted.encoded)), fitted.skipped
