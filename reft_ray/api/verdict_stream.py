"""Rows in, verdict records out: in input order, several batches in flight, memory bounded by the window."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from reft_ray.api.context import Filter
from reft_ray.api.errors import ApiError
from reft_ray.api.moderations import evidence
from reft_ray.api.moderator import ModerationBatch, ModeratorError
from reft_ray.api.rows import Row, lines, overlong_row, parse_row
from reft_ray.core.verdict import Thresholds
from reft_ray.telemetry import catalog

OUTCOMES = ("allow", "review", "block", "invalid")


@dataclass(slots=True)
class Tally:
    """The account of a stream: every row received is answered or counted as unanswered."""

    rows: int = 0
    bytes: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    teachers: dict[str, None] = field(default_factory=dict)

    @property
    def answered(self) -> int:
        """Rows with a verdict, invalid ones included."""
        return self.outcomes.total()

    def trailer(self, done: bool) -> dict[str, Any]:
        """The last record of a stream; a stream without one was cut off."""
        return {
            "type": "trailer",
            "done": done,
            "rows": self.rows,
            **{outcome: self.outcomes[outcome] for outcome in OUTCOMES},
            "unanswered": self.rows - self.answered,
            "bytes": self.bytes,
            "teachers": list(self.teachers),
        }


Batch = list[Row]


class Screening:
    """One pass over a stream of JSONL."""

    def __init__(self, guard: Filter, thresholds: Thresholds | None, stream: str = "screening") -> None:
        self.tally = Tally()
        self._guard = guard
        self._thresholds = thresholds
        self._stream = stream
        settings = guard.settings
        self._settings = settings
        self._rows: asyncio.Queue[Row | None] = asyncio.Queue(settings.batch_rows)
        self._pending: asyncio.Queue[tuple[Batch, asyncio.Task[ModerationBatch | None]] | None]
        self._pending = asyncio.Queue(settings.window)

    async def records(self, chunks: AsyncIterator[bytes]) -> AsyncGenerator[list[dict[str, Any]], None]:
        """Lists of verdict records, one list per batch.

        Raises ApiError when no verdict could be had for a batch, and whatever `chunks` raises; `tally` is right in
        every case. Closing the generator cancels what is in flight.
        """
        reader = asyncio.create_task(self._read(chunks))
        dispatcher = asyncio.create_task(self._dispatch())
        task: asyncio.Task[ModerationBatch | None] | None = None
        try:
            while (entry := await self._pending.get()) is not None:
                batch, task = entry
                try:
                    judgement = await task
                except ModeratorError as error:
                    raise self._guard.failure(error) from None
                yield self._answer(batch, judgement)
            await reader
        finally:
            await _cancel(reader, dispatcher, task, *self._drained())

    async def _read(self, chunks: AsyncIterator[bytes]) -> None:
        limit = self._settings.max_row_bytes
        failure: Exception | None = None
        try:
            async for line in lines(self._counted(chunks), limit):
                number = self.tally.rows
                self.tally.rows += 1
                await self._rows.put(overlong_row(number, limit) if line is None else parse_row(number, line))
        except Exception as error:
            failure = error
        # The rows before the failure are answered first.
        await self._rows.put(None)
        if failure is not None:
            raise failure

    async def _counted(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for chunk in chunks:
            self.tally.bytes += len(chunk)
            yield chunk

    async def _dispatch(self) -> None:
        ended = False
        while not ended:
            batch, ended = await self._batch()
            if batch:
                # The queue holds `window` batches; waiting here is what slows the reader down.
                await self._pending.put((batch, asyncio.create_task(self._judge(batch))))
        await self._pending.put(None)

    async def _batch(self) -> tuple[Batch, bool]:
        """What has arrived, up to the limits: small batches when rows trickle, full ones under load."""
        batch: Batch = []
        size = 0
        row = await self._rows.get()
        while row is not None:
            batch.append(row)
            size += row.size
            if len(batch) >= self._settings.batch_rows or size >= self._settings.batch_bytes or self._rows.empty():
                return batch, False
            row = self._rows.get_nowait()
        return batch, True

    async def _judge(self, batch: Batch) -> ModerationBatch | None:
        conversations = [row.conversation for row in batch if row.conversation is not None]
        if not conversations:
            return None
        deadline = time.monotonic() + self._settings.stall_seconds
        return await self._guard.judge.judge(conversations, self._thresholds, deadline, patient=True)

    def _answer(self, batch: Batch, judgement: ModerationBatch | None) -> list[dict[str, Any]]:
        verdicts = iter(judgement.verdicts if judgement else ())
        if judgement:
            self._guard.record(judgement, self._stream)
            self.tally.teachers[judgement.teacher] = None
        records = []
        for row in batch:
            record: dict[str, Any]
            if row.error is not None:
                record = {"decision": "invalid", "reason": {"code": row.error.code, "message": str(row.error)}}
                self._guard.recorder.count(catalog.SCREENING_INVALID, code=row.error.code)
            else:
                assert judgement is not None
                record = evidence(next(verdicts)) | {"teacher": judgement.teacher}
            self.tally.outcomes[record["decision"]] += 1
            records.append({"type": "verdict", "row": row.number, "id": row.id, **record})
        return records

    def _drained(self) -> list[asyncio.Task[ModerationBatch | None]]:
        tasks = []
        while not self._pending.empty():
            entry = self._pending.get_nowait()
            if entry is not None:
                tasks.append(entry[1])
        return tasks


async def _cancel(*tasks: asyncio.Task[Any] | None) -> None:
    started = [task for task in tasks if task is not None]
    for task in started:
        task.cancel()
    await asyncio.gather(*started, return_exceptions=True)


def error_record(error: ApiError, first_row: int) -> dict[str, Any]:
    """An error after the first byte: no row from `first_row` on has a verdict."""
    return {"type": "error", "first_row": first_row, **error.body()}
