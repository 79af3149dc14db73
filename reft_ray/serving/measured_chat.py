"""Measures a chat model from outside, so that all engines have the same metrics."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import aclosing

from reft_ray.api.chat_model import ChatError, ChatModel, ChatOverloadedError, Target
from reft_ray.core.completion import Piece, RawPrompt, Sampling
from reft_ray.core.conversation import Conversation
from reft_ray.telemetry import catalog
from reft_ray.telemetry.recorder import Recorder


class MeasuredChat:
    """An `api.chat_model.ChatModel` that records tokens, outcomes, time to the first token and between tokens."""

    def __init__(self, model: ChatModel, recorder: Recorder) -> None:
        self._model = model
        self._recorder = recorder
        self._running = 0

    async def generate(
        self, target: Target, prompt: Conversation | RawPrompt, sampling: Sampling
    ) -> AsyncIterator[Piece]:
        model = "base" if target.adapter_uri is None else "student"
        outcome, started, first, last, tokens = "cancelled", time.perf_counter(), 0.0, 0.0, 0
        self._change(1)
        try:
            pieces = self._model.generate(target, prompt, sampling)
            async with aclosing(pieces) as stream:  # type: ignore[type-var]
                async for piece in stream:
                    last = time.perf_counter()
                    if not first:
                        first = last
                        self._recorder.observe(catalog.CHAT_FIRST_TOKEN_SECONDS, first - started, model=model)
                    tokens += piece.tokens
                    if piece.prompt_tokens:
                        self._recorder.count(catalog.CHAT_TOKENS, piece.prompt_tokens, model=model, kind="prompt")
                    if piece.finish_reason is not None:
                        outcome = "completed"
                    yield piece
        except ChatOverloadedError:
            outcome = "overloaded"
            raise
        except ChatError:
            outcome = "failed"
            raise
        finally:
            self._change(-1)
            self._recorder.count(catalog.CHAT_REQUESTS, model=model, outcome=outcome)
            if tokens:
                self._recorder.count(catalog.CHAT_TOKENS, tokens, model=model, kind="completion")
            if tokens > 1:
                self._recorder.observe(catalog.CHAT_TOKEN_SECONDS, (last - first) / (tokens - 1), model=model)

    def _change(self, by: int) -> None:
        self._running += by
        self._recorder.set(catalog.CHAT_RUNNING, self._running)
