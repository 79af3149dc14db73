"""Students in service: one base, adapters on demand, many conversations at once. A plain class with one thread.

Requests for the same adapter that wait together become one batch; the batches take turns, a step each, so that a
long answer keeps nobody waiting.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

from reft_ray.core.completion import Piece, Sampling
from reft_ray.core.conversation import Conversation
from reft_ray.core.errors import PromptTooLongError, ReftError
from reft_ray.hf.adapters import Adapters, Fetch
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.decoding import DecodingBatch
from reft_ray.hf.loading import Base

Listener = Callable[[Piece | Exception], None]
"""Hears every piece of an answer in turn, or what ended it; called from the students' thread, must not block."""

_IDLE_SECONDS = 0.2


class FullError(ReftError):
    """As many conversations are answered and waiting as are allowed."""


@dataclass(slots=True)
class Request:
    """One conversation to answer; `cancel` frees its place."""

    adapter: str | None
    prompt: list[int]
    sampling: Sampling
    listener: Listener
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Nobody listens any more."""
        self.cancelled.set()


@dataclass(slots=True)
class _Batch:
    adapter: str | None
    requests: list[Request]
    decoding: DecodingBatch


class Students:
    """See the module. `max_batch` rows are computed together, `max_rows` answered at a time, `max_waiting` wait."""

    def __init__(
        self,
        base: Base,
        fetch: Fetch,
        max_adapters: int = 8,
        max_batch: int = 16,
        max_rows: int = 64,
        max_waiting: int = 256,
    ) -> None:
        self.adapters = Adapters(base, fetch, max_adapters)
        self._chat = ChatFormat(base.tokenizer)
        self._context = base.context
        self._max_batch, self._max_rows = max_batch, max_rows
        self._waiting: queue.Queue[Request] = queue.Queue(max_waiting)
        self._batches: list[_Batch] = []
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="students", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the thread; answers that are under way end with an error."""
        self._closed.set()
        self._thread.join()

    def answer(
        self, adapter: str | None, conversation: Conversation, sampling: Sampling, listener: Listener
    ) -> Request:
        """Begin an answer, which ends at the latest with the model's context.

        Raises PromptTooLongError where the prompt leaves no room for one, FullError where none may wait.
        """
        prompt = self._chat.prompt(conversation)
        room = self._context - len(prompt)
        if room < 1:
            raise PromptTooLongError(
                f"The model's context holds {self._context} tokens, and the messages take {len(prompt)}."
            )
        request = Request(adapter, prompt, replace(sampling, max_tokens=min(sampling.max_tokens, room)), listener)
        try:
            self._waiting.put_nowait(request)
        except queue.Full:
            raise FullError("too many conversations are waiting") from None
        return request

    def _work(self) -> None:
        while not self._closed.is_set():
            self._admit(wait=not self._batches)
            for batch in self._batches:
                self._step(batch)
            self._batches = [batch for batch in self._batches if not batch.decoding.finished]
        for batch in self._batches:
            self._fail(batch.requests, ReftError("the model is shutting down"))

    def _admit(self, wait: bool) -> None:
        """Take waiting requests in, those for one adapter together."""
        room = self._max_rows - sum(not row.finished for batch in self._batches for row in batch.decoding.rows)
        groups: dict[str | None, list[Request]] = {}
        while room > 0:
            try:
                request = self._waiting.get(timeout=_IDLE_SECONDS) if wait else self._waiting.get_nowait()
            except queue.Empty:
                break
            wait = False
            groups.setdefault(request.adapter, []).append(request)
            room -= 1
        for adapter, requests in groups.items():
            for start in range(0, len(requests), self._max_batch):
                some = requests[start : start + self._max_batch]
                decoding = DecodingBatch([one.prompt for one in some], [one.sampling for one in some], self._chat)
                self._batches.append(_Batch(adapter, some, decoding))

    def _step(self, batch: _Batch) -> None:
        for index, request in enumerate(batch.requests):
            if request.cancelled.is_set():
                batch.decoding.drop(index)
        if batch.decoding.finished:
            return
        living = [request for request, row in zip(batch.requests, batch.decoding.rows, strict=True) if not row.finished]
        try:
            with self.adapters.acting(batch.adapter) as model:
                pieces = batch.decoding.step(model)
        except Exception as error:
            # One adapter that cannot be had must not end the others' answers.
            self._fail(living, error)
            for index in range(len(batch.requests)):
                batch.decoding.drop(index)
            return
        for request, piece in zip(batch.requests, pieces, strict=True):
            if piece is not None:
                request.listener(piece)

    @staticmethod
    def _fail(requests: list[Request], error: Exception) -> None:
        for request in requests:
            request.listener(error)
