"""The interface between HTTP and a chat model: a conversation in, pieces of text out."""

from __future__ import annotations

import random
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal, Protocol

from reft_ray.core.completion import Piece, Sampling
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

    def generate(self, target: Target, conversation: Conversation, sampling: Sampling) -> AsyncIterator[Piece]:
        """Yield pieces as they are generated; only the last one has a `finish_reason`.

        Raises only ChatError. Closing the iterator cancels the request.
        """
        ...


class EchoChat:
    """A fake ChatModel that repeats the last turn, one word per token."""

    async def generate(self, target: Target, conversation: Conversation, sampling: Sampling) -> AsyncIterator[Piece]:
        """With a temperature and a seed, the seed decides the order of the words."""
        words = re.findall(r"\S+\s*", conversation[-1].content)
        if sampling.temperature > 0 and sampling.seed is not None:
            random.Random(sampling.seed).shuffle(words)  # noqa: S311 - not a secret
        prompt_tokens = sum(len(turn.content.split()) for turn in conversation)
        ended: Literal["stop", "length"] = "stop"
        if len(words) > sampling.max_tokens:
            words, ended = words[: sampling.max_tokens], "length"
        for word in words:
            if any(stop in word for stop in sampling.stop):
                ended = "stop"
                break
            yield Piece(word, prompt_tokens=prompt_tokens)
            prompt_tokens = 0
        yield Piece("", tokens=0, prompt_tokens=prompt_tokens, finish_reason=ended)
