"""Rows in, verdict records out, for both screening routes.

The records come in input order; up to `window` batches are in flight, which bounds the memory.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from reft_ray.api.body import declared_bytes, paced
from reft_ray.api.context import FilterContext
from reft_ray.api.errors import ApiError, too_large
from reft_ray.api.moderations import evidence
from reft_ray.api.moderator import ModerationBatch, ModeratorError
from reft_ray.api.rows import Row, lines, overlong_row, parse_row
from reft_ray.api.shares import step_aside
from reft_ray.core.verdict import Thresholds
from reft_ray.telemetry import catalog

NDJSON = "application/x-ndjson"
EVENT_STREAM = "text/event-stream"
JSONL_BODY = {"content": {"application/jsonl": {"schema": {"type": "string", "format": "binary"}}}, "required": True}
OUTCOMES = ("allow", "review", "block", "invalid")
SLICE_SECONDS, SLICE_ROWS = 0.002, 64
"""For how long rows are read, and how many verdicts are written, before other requests are served."""


@dataclass(slots=True)
class Tally:
    """Counts of a stream: every received row is either answered or unanswered."""

    rows: int = 0
    bytes: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    teachers: dict[str, None] = field(default_factory=dict)

    @property
    def answered(self) -> int:
        """Rows with a verdict, invalid ones included."""
        return self.outcomes.total()

    def trailer(self, done: bool) -> dict[str, Any]:
        """The last record of a stream; a stream without it was cut off."""
        return {
            "type": "trailer",
            "done": done,
            "rows": self.rows,
            **{outcome: self.outcomes[outcome] for outcome in OUTCOMES},
            "unanswered": self.rows - self.answered,
            "bytes": self.bytes,
            "teachers": list(self.teachers),
        }


class VerdictStream:
    """One pass over a stream of JSONL."""

    def __init__(self, context: FilterContext, thresholds: Thresholds | None, stream: str = "screening") -> None:
        self.tally = Tally()
        self._context = context
        self._settings = settings = context.settings
        self._thresholds = thresholds
        self._stream = stream
        self._rows: asyncio.Queue[Row | None] = asyncio.Queue(settings.batch_rows)
        self._pending: asyncio.Queue[tuple[list[Row], asyncio.Task[ModerationBatch]] | None]
        self._pending = asyncio.Queue(settings.window)
        self._judged: set[asyncio.Task[ModerationBatch]] = set()

    async def records(self, chunks: AsyncIterator[bytes]) -> AsyncGenerator[list[dict[str, Any]], None]:
        """Yield lists of verdict records.

        Raises ApiError when a batch gets no verdicts, and whatever `chunks` raises; `tally` is correct in every case.
        Closing the generator cancels the batches in flight.
        """
        reader = asyncio.create_task(self._read(chunks))
        dispatcher = asyncio.create_task(self._dispatch())
        try:
            while (entry := await self._pending.get()) is not None:
                rows, task = entry
                try:
                    verdicts = await task
                except ModeratorError as error:
                    raise self._context.failure(error) from None
                self._judged.remove(task)
                records = self._records(rows, verdicts)
                for first in range(0, len(records), SLICE_ROWS):
                    yield records[first : first + SLICE_ROWS]
                    await step_aside(self._context.turns)
            await reader
        finally:
            await _cancel(reader, dispatcher, *self._judged)

    async def _read(self, chunks: AsyncIterator[bytes]) -> None:
        limit = self._settings.max_row_bytes
        failure: Exception | None = None
        invalid = 0
        until = time.perf_counter() + SLICE_SECONDS
        try:
            async for line in lines(self._counted(chunks), limit):
                number = self.tally.rows
                self.tally.rows += 1
                row = overlong_row(number, limit) if line is None else parse_row(number, line)
                await self._rows.put(row)
                invalid += row.error is not None
                if invalid > self._settings.max_invalid_rows:
                    raise _not_rows(self._settings.max_invalid_rows)
                if time.perf_counter() >= until:
                    await step_aside(self._context.turns)
                    until = time.perf_counter() + SLICE_SECONDS
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
            rows, ended = await self._batch()
            if rows:
                task = asyncio.create_task(self._judge(rows))
                self._judged.add(task)
                # Back-pressure: the queue holds `window` batches, and this waits while it is full.
                await self._pending.put((rows, task))
        await self._pending.put(None)

    async def _batch(self) -> tuple[list[Row], bool]:
        """The rows that have arrived, up to the limits: small batches at a low rate, full ones under load."""
        rows: list[Row] = []
        size = 0
        row = await self._rows.get()
        while row is not None:
            rows.append(row)
            size += row.size
            if len(rows) >= self._settings.batch_rows or size >= self._settings.batch_bytes or self._rows.empty():
                return rows, False
            row = self._rows.get_nowait()
        return rows, True

    async def _judge(self, rows: list[Row]) -> ModerationBatch:
        conversations = [row.conversation for row in rows if row.conversation is not None]
        if not conversations:
            return ModerationBatch("", [])
        deadline = time.monotonic() + self._settings.stall_seconds
        return await self._context.moderator.judge(conversations, self._thresholds, deadline, patient=True)

    def _records(self, rows: list[Row], batch: ModerationBatch) -> list[dict[str, Any]]:
        verdicts = iter(batch.verdicts)
        if batch.verdicts:
            self._context.record(batch, self._stream)
            self.tally.teachers[batch.teacher] = None
        records = []
        for row in rows:
            record: dict[str, Any]
            if row.error is not None:
                record = {"decision": "invalid", "reason": {"code": row.error.code, "message": str(row.error)}}
                self._context.recorder.count(catalog.SCREENING_INVALID, code=row.error.code)
            else:
                record = evidence(next(verdicts)) | {"teacher": batch.teacher, "policy": batch.policy}
            self.tally.outcomes[record["decision"]] += 1
            records.append({"type": "verdict", "row": row.number, "id": row.id, **record})
        return records


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _not_rows(limit: int) -> ApiError:
    message = f"More than {limit:,} lines are not valid rows. Check the file first: `reft-ray validate FILE`."
    return ApiError(400, message, code="too_many_invalid_rows")


def error_record(error: ApiError, first_row: int) -> dict[str, Any]:
    """The record of an error within a stream: no row from `first_row` on has a verdict."""
    return {"type": "error", "first_row": first_row, **error.body()}


def ndjson(records: Iterable[dict[str, Any]]) -> bytes:
    """Records as lines."""
    return b"".join(json.dumps(record, separators=(",", ":")).encode() + b"\n" for record in records)


def read_body(request: Request, limit: int, idle_seconds: float, message: str) -> AsyncIterator[bytes]:
    """The pieces of a body of up to `limit` bytes.

    Raises ApiError: 413 with `message` for a larger body, at once where its length was declared; 408 for a client that
    sends too slowly, see `body.paced`.
    """
    if declared_bytes(request) > limit:
        raise too_large(message)
    return _pieces(request, limit, idle_seconds, message)


async def _pieces(request: Request, limit: int, idle_seconds: float, message: str) -> AsyncIterator[bytes]:
    received = 0
    async for piece in Request(request.scope, paced(request.receive, idle_seconds)).stream():
        received += len(piece)
        if received > limit:
            raise too_large(message)
        yield piece
