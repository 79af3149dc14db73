"""The interface between HTTP and a chat model: a conversation in, pieces of text out."""

from __future__ import annotations

import random
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from reft_ray.core.completion import Piece, RawPrompt, Sampling, TokenLogprob
from reft_ray.core.conversation import Conversation


class ChatError(Exception):
    """No completion could be generated."""


class ChatOverloadedError(ChatError):
    """The model's queue is full; `retry_after` in seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ContextLengthError(ChatError):
    """Conversation and requested completion exceed the model's context; the message says by how much."""


class ConversationError(ChatError):
    """The model does not accept this conversation, e.g. its chat template rejects the order of turns."""


@dataclass(frozen=True, slots=True)
class Target:
    """A base model with an adapter (`adapter_uri` of None: the base model itself).

    `name` is the name in the request. Replicas cache adapters by URI: the files under a URI never change.
    """

    name: str
    base_model: str
    base_uri: str
    adapter_uri: str | None = None


class ChatModel(Protocol):
    """Generates completions: a handle to student replicas, or EchoChat in tests."""

    def generate(self, target: Target, prompt: Conversation | RawPrompt, sampling: Sampling) -> AsyncIterator[Piece]:
        """Yield pieces as they are generated; only the last one has a `finish_reason`.

        Raises only ChatError. Closing the iterator cancels the request.
        """
        ...


class EchoChat:
    """A fake ChatModel that repeats the last turn, one word per token."""

    async def generate(
        self, target: Target, prompt: Conversation | RawPrompt, sampling: Sampling
    ) -> AsyncIterator[Piece]:
        """With a temperature and a seed, the seed decides the order of the words."""
        turns = [prompt.text] if isinstance(prompt, RawPrompt) else [turn.content for turn in prompt]
        words = re.findall(r"\S+\s*", turns[-1])
        if sampling.temperature > 0 and sampling.seed is not None:
            random.Random(sampling.seed).shuffle(words)  # noqa: S311 - not a secret
        prompt_tokens = sum(len(text.split()) for text in turns)
        if sampling.echo:
            first, *others = _echoed_logprobs(words, sampling) or (None,)
            known = () if first is None else (TokenLogprob(first.token, None), *others)
            yield Piece(turns[-1], tokens=0, logprobs=known)
        ended: Literal["stop", "length"] = "stop"
        if len(words) > sampling.max_tokens:
            words, ended = words[: sampling.max_tokens], "length"
        for word in words:
            if any(stop in word for stop in sampling.stop):
                ended = "stop"
                break
            yield Piece(word, prompt_tokens=prompt_tokens, logprobs=_echoed_logprobs([word], sampling))
            prompt_tokens = 0
        yield Piece("", tokens=0, prompt_tokens=prompt_tokens, finish_reason=ended)


def _echoed_logprobs(words: Sequence[str], sampling: Sampling) -> tuple[TokenLogprob, ...]:
    """Each word is as likely as its length says."""
    if sampling.logprobs is None:
        return ()
    return tuple(TokenLogprob(word, -len(word) / 8, ((word, -len(word) / 8),)[: sampling.logprobs]) for word in words)
