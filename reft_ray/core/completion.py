"""Completions as models generate them and the HTTP API returns them: sampling parameters, and pieces of text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose the next token. A temperature of 0 is greedy; `seed` makes sampling repeatable.

    With `must_fit` it is an error if `max_tokens` do not fit the context; otherwise the completion ends there.
    Penalties count the tokens of the completion alone.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    must_fit: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a completion: text, the tokens that it took, and on the last piece the finish reason.

    `prompt_tokens` is set on one piece and 0 on the others. Stop sequences are not part of the text.
    """

    text: str
    tokens: int = 1
    prompt_tokens: int = 0
    finish_reason: Literal["stop", "length"] | None = None
