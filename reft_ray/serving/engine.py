"""Continuous batching on one model: requests join and leave the batch between two decoding steps.

The small engine for CPUs and demos; on GPUs students are served by vLLM or `ray.serve.llm` (`endpoint_chat`). One
thread runs the model (`hf.decoding`), and coroutines wait for pieces of text.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reft_ray.api.chat_model import ChatError, ChatOverloadedError
from reft_ray.core.completion import Piece, Sampling, TokenLogprob
from reft_ray.core.errors import ReftError
from reft_ray.hf.decoding import DecodingBatch
from reft_ray.hf.sampling import DecodingRow, TokenScore
from reft_ray.hf.shared_base import SharedBase
from reft_ray.hf.text_stream import TextStream
from reft_ray.serving.args import ChatArgs

logger = logging.getLogger(__name__)

PIECE_SECONDS = 0.02
"""Tokens that follow faster are sent as one piece: sending one costs more than computing a token of a small model."""


@dataclass(slots=True, eq=False)
class Request:
    """One completion: its row of the batch, its text, and the callback to the coroutine that waits for it."""

    row: DecodingRow
    folder: Path | None
    text: TextStream
    emit: Callable[[Piece | ChatError], None]
    cancelled: bool = False
    echoed: str | None = None
    """The prompt's text, for a completion that begins with it."""

    @property
    def final_length(self) -> int:
        """The longest that the row may become, in tokens."""
        return len(self.row.prompt) + self.row.sampling.max_tokens


class ChatEngine:
    """Completes prompts on a shared base. `close` ends the thread and fails ongoing requests with ChatError."""

    def __init__(self, base: SharedBase, args: ChatArgs | None = None) -> None:
        self.base = base
        self._args = args or ChatArgs()
        self._stop_ids = base.chat.stop_ids
        self._batch = DecodingBatch(base)
        self._waiting: deque[Request] = deque()
        self._running: dict[DecodingRow, Request] = {}
        self._changed = threading.Condition()
        self._closed = False
        self.failed_steps = 0
        """Consecutive failures of the whole batch; failures of single requests do not count."""
        self._thread = threading.Thread(target=self._work, name="chat-engine", daemon=True)
        self._thread.start()

    @property
    def ongoing_requests(self) -> int:
        """Requests that run or wait."""
        with self._changed:
            return len(self._waiting) + len(self._running)

    @property
    def waiting_requests(self) -> int:
        """Requests that wait for a place in the batch."""
        return len(self._waiting)

    @property
    def is_alive(self) -> bool:
        """Whether requests are accepted."""
        return self._thread.is_alive() and not self._closed

    async def complete(
        self,
        prompt: list[int],
        adapter: str | None,
        folder: Path | None,
        sampling: Sampling,
        echoed: str | None = None,
    ) -> AsyncIterator[Piece]:
        """Yield the pieces of a completion; `folder` holds the adapter with the key `adapter`.

        With `echoed`, the text of the prompt, that comes first, with its log probabilities where they are asked for.

        Raises ChatError. Closing the iterator removes the row before the next step.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Piece | ChatError] = asyncio.Queue()

        def emit(item: Piece | ChatError) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, item)

        request = Request(
            DecodingRow(sampling, prompt, adapter), folder, TextStream(self.base.chat.tokenizer, sampling.stop), emit
        )
        request.echoed = echoed
        with self._changed:
            if not self.is_alive:
                raise ChatError("the model has been stopped")
            if len(self._waiting) + len(self._running) >= self._args.max_rows + self._args.max_waiting:
                raise ChatOverloadedError("the model's queue is full")
            self._waiting.append(request)
            self._changed.notify()
        sent_at = 0.0
        try:
            while True:
                items = [await queue.get()]
                pause = sent_at + PIECE_SECONDS - loop.time()
                if pause > 0 and not _is_last(items[0]):
                    await asyncio.sleep(pause)
                while not queue.empty() and not _is_last(items[-1]):
                    items.append(queue.get_nowait())
                pieces = [item for item in items if isinstance(item, Piece)]
                if pieces:
                    sent_at = loop.time()
                    yield _joined(pieces)
                last = items[-1]
                if isinstance(last, ChatError):
                    raise last
                if last.finish_reason is not None:
                    return
        finally:
            request.cancelled = True

    def close(self) -> None:
        """Stop the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while self._turn():
            pass
        with self._changed:
            requests = [*self._running.values(), *self._waiting]
            self._waiting.clear()
        self._fail(requests, "the model has been stopped")

    def _turn(self) -> bool:
        """Wait for work, change the batch and run one step; False once the engine is closed."""
        with self._changed:
            while not (self._waiting or self._running or self._closed):
                self._changed.wait()
            if self._closed:
                return False
            self._waiting = deque(request for request in self._waiting if not request.cancelled)
            cancelled = [request.row for request in self._running.values() if request.cancelled]
            requests = self._next_requests(rows=len(self._running) - len(cancelled))
        try:
            self._remove(cancelled)
            self._prefill(self._admit(requests))
            if self._batch.rows:
                tokens = self._batch.step()
                self.failed_steps = 0
                self._emit_all(self._batch.rows, tokens)
        except Exception as error:
            # The batch may be in any state.
            logger.exception("the batch failed")
            self.failed_steps += 1
            self._batch.clear()
            with self._changed:
                running = list(self._running.values())
            self._fail(running, f"the model failed: {type(error).__name__}")
        return True

    def _next_requests(self, rows: int) -> list[Request]:
        """Take waiting requests in order while the limits on rows, cache and prompt tokens allow."""
        requests: list[Request] = []
        longest = max((request.final_length for request in self._running.values()), default=0)
        prompts = 0
        while self._waiting and rows < self._args.max_rows:
            request = self._waiting[0]
            longest, prompts = max(longest, request.final_length), prompts + len(request.row.prompt)
            if (rows and (rows + 1) * longest > self._args.cache_tokens) or (
                requests and prompts > self._args.prompt_tokens
            ):
                break
            requests.append(self._waiting.popleft())
            self._running[request.row] = request
            rows += 1
        return requests

    def _admit(self, requests: Sequence[Request]) -> list[Request]:
        """Load the adapters of requests. If one has no slot, its request and all later ones wait, to keep the order.

        When an adapter does not load, a trial run of the base raises if the device is at fault, and not the adapter.
        """
        busy = {row.adapter for row in self._batch.rows}
        admitted: list[Request] = []
        for index, request in enumerate(requests):
            key, folder = request.row.adapter, request.folder
            try:
                loaded = key is None or folder is None or self.base.ensure_adapter(key, folder, busy)
            except ReftError as error:
                self.base.trial_run()
                self._fail([request], str(error))
                continue
            if not loaded:
                with self._changed:
                    for later in reversed(requests[index:]):
                        del self._running[later.row]
                        self._waiting.appendleft(later)
                break
            busy.add(key)
            admitted.append(request)
        return admitted

    def _prefill(self, requests: Sequence[Request]) -> None:
        if not requests:
            return
        rows = [request.row for request in requests]
        try:
            tokens = self._batch.add(rows)
        except Exception as error:
            logger.exception("%d prompts failed", len(rows))
            # As in `_admit`: raises if the device is at fault.
            self.base.trial_run()
            self._fail(requests, f"the model failed: {type(error).__name__}")
            return
        self._echo(requests)
        self._emit_all(rows, tokens)

    def _echo(self, requests: Sequence[Request]) -> None:
        """Send the prompts of requests that ask for them."""
        for request in requests:
            row, top = request.row, request.row.sampling.logprobs
            if request.echoed is None:
                continue
            logprobs: list[TokenLogprob] = []
            if top is not None:
                scores = self.base.prompt_scores(row.prompt, row.adapter, top)
                first = TokenLogprob(self._token(row.prompt[0]), None)
                pairs = zip(row.prompt[1:], scores, strict=True)
                logprobs = [first, *(self._logprob(token, score) for token, score in pairs)]
            request.emit(Piece(request.echoed, tokens=0, logprobs=tuple(logprobs)))

    def _token(self, token: int) -> str:
        return str(self.base.chat.tokenizer.decode([token]))

    def _logprob(self, token: int, score: TokenScore) -> TokenLogprob:
        top = tuple((self._token(other), value) for other, value in score.top)
        return TokenLogprob(self._token(token), score.logprob, top)

    def _emit_all(self, rows: Sequence[DecodingRow], tokens: Sequence[int | None]) -> None:
        requests = [self._running[row] for row in rows]
        items = [self._item(request, token) for request, token in zip(requests, tokens, strict=True)]
        # A caller that has its last piece finds its row free.
        ended = [isinstance(item, ChatError) or item.finish_reason is not None for item in items]
        self._remove([row for row, last in zip(rows, ended, strict=True) if last])
        for request, item in zip(requests, items, strict=True):
            request.emit(item)

    def _item(self, request: Request, token: int | None) -> Piece | ChatError:
        """What a request gets for its next token."""
        if token is None:
            return ChatError("the model's logits are NaN")
        row = request.row
        reason: Literal["stop", "length"] | None = None
        text, stopped = ("", False) if token in self._stop_ids else request.text.push(token)
        if stopped:
            reason = "stop"
        elif token in self._stop_ids or len(row.tokens) >= row.sampling.max_tokens:
            reason = "stop" if token in self._stop_ids else "length"
            text += request.text.flush()
        prompt_tokens = len(row.prompt) if len(row.tokens) == 1 else 0
        logprobs = (self._logprob(token, row.score),) if row.score is not None else ()
        return Piece(text, prompt_tokens=prompt_tokens, finish_reason=reason, logprobs=logprobs)

    def _remove(self, rows: Sequence[DecodingRow]) -> None:
        if rows:
            self._batch.remove(rows)
            with self._changed:
                for row in rows:
                    self._running.pop(row, None)

    def _fail(self, requests: Sequence[Request], message: str) -> None:
        """End requests that are not in the batch with a ChatError."""
        with self._changed:
            for request in requests:
                self._running.pop(request.row, None)
        for request in requests:
            request.emit(ChatError(message))


def _is_last(item: Piece | ChatError) -> bool:
    return isinstance(item, ChatError) or item.finish_reason is not None


def _joined(pieces: Sequence[Piece]) -> Piece:
    return Piece(
        "".join(piece.text for piece in pieces),
        sum(piece.tokens for piece in pieces),
        sum(piece.prompt_tokens for piece in pieces),
        pieces[-1].finish_reason,
        tuple(item for piece in pieces for item in piece.logprobs),
    )
