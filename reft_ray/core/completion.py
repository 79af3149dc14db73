"""Completions as models generate them and the HTTP API returns them: sampling parameters, and pieces of text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose the next token. A temperature of 0 is greedy; `seed` makes sampling repeatable.

    With `must_fit` it is an error if `max_tokens` do not fit the context; otherwise the completion ends there.
    Penalties count the tokens of the completion alone. `logprobs` asks for log probabilities and that many alternatives
    per token; with `echo` the completion begins with a raw prompt.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    must_fit: bool = False
    logprobs: int | None = None
    echo: bool = False


@dataclass(frozen=True, slots=True)
class RawPrompt:
    """A prompt without a chat template: a text, or token ids of the base model's tokenizer."""

    text: str = ""
    ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token as text with its log probability, None for the first of a prompt, and the most likely tokens there.

    Log probabilities are those of the model: before temperature, penalties and `top_p`.
    """

    token: str
    logprob: float | None
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a completion: text, the tokens that it took, and on the last piece the finish reason.

    `prompt_tokens` is set on one piece and 0 on the others. Stop sequences are not part of the text. `logprobs` has
    those of its tokens, where asked for.
    """

    text: str
    tokens: int = 1
    prompt_tokens: int = 0
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
