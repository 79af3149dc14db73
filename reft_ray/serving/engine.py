"""The thread that owns a model and completes whoever is there: requests join and leave between two tokens.

A plain class over `hf.decoding`: one thread runs the model, coroutines wait for its pieces.
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
from reft_ray.core.completion import Piece, Sampling
from reft_ray.core.errors import ReftError
from reft_ray.hf.decoding import DecodingBatch
from reft_ray.hf.sampling import DecodingRow
from reft_ray.hf.shared_base import SharedBase
from reft_ray.hf.text_stream import TextStream

logger = logging.getLogger(__name__)

PIECE_SECONDS = 0.02
"""Tokens that come faster than this travel together: a piece costs more on its way than a token of a small model."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """`rows` at once, `waiting` behind them, and `tokens` of cache: rows times the longest that one may become."""

    rows: int = 32
    waiting: int = 64
    tokens: int = 65_536
    prompt_tokens: int = 8192
    """What is read between two steps, so that those who are being answered do not stall."""


@dataclass(slots=True, eq=False)
class _Seat:
    """One request: its row in the batch, its text, and the coroutine that waits for it."""

    row: DecodingRow
    folder: Path | None
    most: int
    text: TextStream
    say: Callable[[Piece | ChatError], None]
    prompt_tokens: int
    gone: bool = False

    @property
    def longest(self) -> int:
        """Tokens when it is complete."""
        return len(self.row.prompt) + self.most


class ChatEngine:
    """Completes prompts on a shared base. `close` ends the thread; requests under way get a ChatError."""

    def __init__(self, base: SharedBase, bounds: Bounds | None = None) -> None:
        self.base = base
        self.bounds = bounds or Bounds()
        self._stops = base.chat.stop_ids
        self._batch = DecodingBatch(base)
        self._waiting: deque[_Seat] = deque()
        self._seated: dict[DecodingRow, _Seat] = {}
        self._changed = threading.Condition()
        self._closed = False
        self.failed_turns = 0
        """In a row: what belongs to one request is not counted, and a step that succeeds ends the row."""
        self._thread = threading.Thread(target=self._work, name="chat-engine", daemon=True)
        self._thread.start()

    @property
    def under_way(self) -> int:
        """Requests that are being completed or wait for it."""
        with self._changed:
            return len(self._waiting) + len(self._seated)

    @property
    def is_alive(self) -> bool:
        """Whether requests are still completed."""
        return self._thread.is_alive() and not self._closed

    async def complete(
        self, prompt: list[int], adapter: str | None, folder: Path | None, sampling: Sampling, most: int
    ) -> AsyncIterator[Piece]:
        """Pieces of one completion of `most` tokens at most; `folder` holds the adapter called `adapter`.

        Raises ChatError. Closing the iterator frees the row's place before the next token.
        """
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Piece | ChatError] = asyncio.Queue()
        seat = _Seat(
            DecodingRow(sampling, prompt, adapter),
            folder,
            most,
            TextStream(self.base.chat.tokenizer, sampling.stop),
            lambda piece: _tell(loop, pieces, piece),
            len(prompt),
        )
        with self._changed:
            if not self.is_alive:
                raise ChatError("the model has been stopped")
            if len(self._waiting) + len(self._seated) >= self.bounds.rows + self.bounds.waiting:
                raise ChatOverloadedError("the model's queue is full")
            self._waiting.append(seat)
            self._changed.notify()
        spoke = 0.0
        try:
            while True:
                gathered = [await pieces.get()]
                pause = spoke + PIECE_SECONDS - loop.time()
                if pause > 0 and _goes_on(gathered[0]):
                    await asyncio.sleep(pause)
                while not pieces.empty() and _goes_on(gathered[-1]):
                    gathered.append(pieces.get_nowait())
                piece = _joined([item for item in gathered if isinstance(item, Piece)])
                if piece is not None:
                    spoke = loop.time()
                    yield piece
                if isinstance(gathered[-1], ChatError):
                    raise gathered[-1]
                if piece is not None and piece.finish_reason is not None:
                    return
        finally:
            seat.gone = True

    def close(self) -> None:
        """See the class."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while self._turn():
            pass
        with self._changed:
            left = [*self._seated.values(), *self._waiting]
            self._seated.clear()
            self._waiting.clear()
        for seat in left:
            seat.say(ChatError("the model has been stopped"))

    def _turn(self) -> bool:
        """Let requests in, and give every row a token; False when there will be none any more."""
        with self._changed:
            while not (self._waiting or self._seated or self._closed):
                self._changed.wait()
            if self._closed:
                return False
            self._waiting = deque(seat for seat in self._waiting if not seat.gone)
            leaving = [seat.row for seat in self._seated.values() if seat.gone]
            coming = self._invited(gone=len(leaving))
        try:
            self._leave(leaving)
            self._join(self._admitted(coming))
            if self._batch.rows:
                tokens = self._batch.step()
                self.failed_turns = 0
                self._deliver(self._batch.rows, tokens)
        except Exception as error:
            # Nobody knows in what state the batch is.
            logger.exception("the batch failed")
            self.failed_turns += 1
            self._fail(error)
        return True

    def _invited(self, gone: int) -> list[_Seat]:
        """The next requests, in order, as long as rows, cache and prompts have room."""
        coming: list[_Seat] = []
        bounds, rows = self.bounds, len(self._seated) - gone
        longest = max((seat.longest for seat in self._seated.values()), default=0)
        prompts = 0
        while self._waiting and rows < bounds.rows:
            seat = self._waiting[0]
            longest, prompts = max(longest, seat.longest), prompts + len(seat.row.prompt)
            if (rows and (rows + 1) * longest > bounds.tokens) or (coming and prompts > bounds.prompt_tokens):
                break
            coming.append(self._waiting.popleft())
            self._seated[seat.row] = seat
            rows += 1
        return coming

    def _admitted(self, coming: Sequence[_Seat]) -> list[_Seat]:
        """Those whose adapters are there. Who finds no place for an adapter waits, and so do all behind: in turn.

        Raises when the base alone fails as well: then the adapter was not at fault. So does `_join` about prompts.
        """
        busy = {row.adapter for row in self._batch.rows}
        admitted: list[_Seat] = []
        for index, seat in enumerate(coming):
            key, folder = seat.row.adapter, seat.folder
            try:
                there = key is None or folder is None or self.base.ensure_adapter(key, folder, busy)
            except ReftError as error:
                self.base.trial_run()
                self._unseat(seat.row)
                seat.say(ChatError(str(error)))
                continue
            if not there:
                with self._changed:
                    for late in reversed(coming[index:]):
                        del self._seated[late.row]
                        self._waiting.appendleft(late)
                break
            busy.add(key)
            admitted.append(seat)
        return admitted

    def _join(self, seats: Sequence[_Seat]) -> None:
        if not seats:
            return
        try:
            tokens = self._batch.add([seat.row for seat in seats])
        except Exception as error:
            logger.exception("%d prompts could not be read", len(seats))
            self.base.trial_run()
            for seat in seats:
                self._unseat(seat.row)
                seat.say(ChatError(f"the model failed: {type(error).__name__}"))
            return
        self._deliver([seat.row for seat in seats], tokens)

    def _deliver(self, rows: Sequence[DecodingRow], tokens: Sequence[int | None]) -> None:
        done = [row for row, token in zip(rows, tokens, strict=True) if self._spoken(self._seated[row], token)]
        self._leave(done)

    def _spoken(self, seat: _Seat, token: int | None) -> bool:
        """Tell the request of its token; whether it was the last one."""
        if token is None:
            seat.say(ChatError("the model gave no numbers"))
            return True
        reason: Literal["stop", "length"] | None = None
        text, stopped = ("", False) if token in self._stops else seat.text.push(token)
        if stopped:
            reason = "stop"
        elif token in self._stops or len(seat.row.tokens) >= seat.most:
            reason = "stop" if token in self._stops else "length"
            text += seat.text.flush()
        seat.say(Piece(text, prompt_tokens=seat.prompt_tokens, finish_reason=reason))
        seat.prompt_tokens = 0
        return reason is not None

    def _leave(self, rows: Sequence[DecodingRow]) -> None:
        if rows:
            self._batch.remove(rows)
            for row in rows:
                self._unseat(row)

    def _unseat(self, row: DecodingRow) -> None:
        with self._changed:
            self._seated.pop(row, None)

    def _fail(self, error: Exception) -> None:
        self._batch.clear()
        with self._changed:
            seats = list(self._seated.values())
            self._seated.clear()
        for seat in seats:
            seat.say(ChatError(f"the model failed: {type(error).__name__}"))


def _tell(loop: asyncio.AbstractEventLoop, pieces: asyncio.Queue[Piece | ChatError], piece: Piece | ChatError) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(pieces.put_nowait, piece)


def _goes_on(item: Piece | ChatError) -> bool:
    return isinstance(item, Piece) and item.finish_reason is None


def _joined(pieces: Sequence[Piece]) -> Piece | None:
    if not pieces:
        return None
    return Piece(
        "".join(piece.text for piece in pieces),
        sum(piece.tokens for piece in pieces),
        sum(piece.prompt_tokens for piece in pieces),
        pieces[-1].finish_reason,
    )
