"""The seam between HTTP and a model that talks: a conversation in, pieces of text out."""

from __future__ import annotations

import random
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal, Protocol

from reft_ray.core.completion import Piece, Sampling
from reft_ray.core.conversation import Conversation


class ChatError(Exception):
    """No completion could be had."""


class ChatOverloadedError(ChatError):
    """The model's queue is full; `retry_after` in seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ContextLengthError(ChatError):
    """The conversation and the asked completion do not fit into the model's context; the message says by how much."""


class ConversationError(ChatError):
    """The model cannot take this conversation, such as one whose turns its chat template refuses."""


@dataclass(frozen=True, slots=True)
class Target:
    """Which model talks: a base model, and the adapter on it (`adapter_uri` of None: the base model itself).

    `name` is what the user called it; replicas keep adapters by their URI, for what lies under one never changes.
    """

    name: str
    base_model: str
    base_uri: str
    adapter_uri: str | None = None


class ChatModel(Protocol):
    """A model in service: a handle to student replicas, or the echo below in tests."""

    def generate(self, target: Target, conversation: Conversation, sampling: Sampling) -> AsyncIterator[Piece]:
        """Pieces as they are made; the last one, and only it, has a `finish_reason`.

        Raises ChatError and nothing else; closing the iterator frees the model's place.
        """
        ...


class EchoChat:
    """Repeats the last turn word by word, a word being a token; the fake behind the ChatModel seam."""

    async def generate(self, target: Target, conversation: Conversation, sampling: Sampling) -> AsyncIterator[Piece]:
        """See ChatModel. With a temperature and a seed the words come in an order that the seed decides."""
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
