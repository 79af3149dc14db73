"""Resumable screenings: create one, send numbered chunks, read verdicts from any row, close it.

A chunk is judged within its own request, which gives back-pressure: the number of chunks in flight is the number of
open requests, and there is no unbounded queue.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi import Path as PathParameter
from starlette.responses import StreamingResponse

from reft_ray.api.context import FilterContext, charge, owner_of
from reft_ray.api.errors import ApiError, busy, conflict, invalid
from reft_ray.api.schema import ChunkReceipt, Counts, Screening, ScreeningClose, ScreeningCreate
from reft_ray.api.screening_store import Chunk, ScreeningStore, State
from reft_ray.api.shares import Shares
from reft_ray.api.verdict_stream import EVENT_STREAM, JSONL_BODY, NDJSON, OUTCOMES, VerdictStream, ndjson, read_body
from reft_ray.core.verdict import Thresholds
from reft_ray.telemetry import catalog

POLL_SECONDS = 0.25
ROW_BYTES = 64
PIECE_ROWS = 2_000
"""Verdicts that are numbered at once: between two pieces other requests are served."""

_NUMBERED = re.compile(rb'(\{"type":"verdict","row":)(\d+)(.*)', re.DOTALL)
_ANSWER: dict[int | str, dict[str, Any]] = {200: {"content": {NDJSON: {}, EVENT_STREAM: {}}}}

ScreeningId = Annotated[str, PathParameter(description="The id of the screening.", max_length=64)]
Sequence = Annotated[int, PathParameter(ge=0, description="The chunk's number; the first chunk is 0.")]
Cursor = Annotated[int | None, Query(ge=0, description="The first row to read.")]


def router(context: FilterContext, store: ScreeningStore | None) -> APIRouter:
    """The routes of resumable screenings; without a store they answer 501."""
    routes = APIRouter(tags=["screenings"])
    slots = Shares(context.settings.max_streams, context.settings.max_streams_per_project)

    def required_store() -> ScreeningStore:
        if store is None:
            raise ApiError(501, "Resumable screenings are not configured on this service.")
        return store

    async def state_of(request: Request, screening_id: str) -> State:
        return await asyncio.to_thread(required_store().state, screening_id, owner_of(request))

    @routes.post("/screenings/resumable")
    async def create(request: Request, body: ScreeningCreate) -> Screening:
        """Open a screening for a dataset of any size."""
        override = body.reft
        limits = await context.thresholds(override.review, override.block) if override else None
        state = await asyncio.to_thread(
            required_store().create,
            owner_of(request),
            limits.review if limits else None,
            limits.block if limits else None,
            body.metadata,
        )
        return _public(state)

    @routes.get("/screenings/{screening_id}")
    async def retrieve(request: Request, screening_id: ScreeningId) -> Screening:
        """Retrieve a screening; `next_chunk` is the chunk to resume from."""
        return _public(await state_of(request, screening_id))

    @routes.put("/screenings/{screening_id}/chunks/{sequence}", openapi_extra={"requestBody": JSONL_BODY})
    async def append(request: Request, screening_id: ScreeningId, sequence: Sequence) -> ChunkReceipt:
        """Send complete lines of JSONL and have them judged; a chunk may be sent again."""
        limit = context.settings.max_chunk_bytes
        message = f"A chunk may have {limit:,} bytes: send the dataset in more chunks."
        pieces = read_body(request, limit, context.settings.idle_seconds, message)
        body = b"".join([piece async for piece in pieces])
        if body.count(b"\n") > context.settings.max_chunk_rows:
            raise invalid(
                f"A chunk may have {context.settings.max_chunk_rows:,} rows: send the dataset in more chunks."
            )
        state = await state_of(request, screening_id)
        digest = hashlib.sha256(body).hexdigest()
        chunk = required_store().known(state, sequence, digest)
        if chunk is not None:
            return _receipt(chunk, duplicate=True)
        limits = await _limits(context, state)
        # A row costs more than its bytes: its verdict is stored.
        await charge(request, len(body) + ROW_BYTES * body.count(b"\n"))
        if not slots.take(owner_of(request)):
            context.recorder.count(catalog.FILTER_SHED, reason="verdicts_lag")
            raise busy("Other chunks are being judged; try again.", 1)
        try:
            with context.timed("screening"):
                chunk, verdicts = await _judged(context, limits, sequence, digest, body)
        finally:
            slots.give(owner_of(request))
        await asyncio.to_thread(required_store().keep, state, chunk, verdicts)
        return _receipt(chunk, duplicate=False)

    @routes.post("/screenings/{screening_id}/close")
    async def close(request: Request, screening_id: ScreeningId, body: ScreeningClose) -> Screening:
        """Close a screening; missing chunks may still be sent."""
        state = await state_of(request, screening_id)
        return _public(await asyncio.to_thread(required_store().close, state, body.chunks))

    @routes.delete("/screenings/{screening_id}")
    async def delete(request: Request, screening_id: ScreeningId) -> dict[str, Any]:
        """Delete a screening and its verdicts."""
        state = await state_of(request, screening_id)
        await asyncio.to_thread(required_store().delete, state)
        return {"id": state.about.id, "object": "screening", "deleted": True}

    @routes.get("/screenings/{screening_id}/verdicts", response_class=StreamingResponse, responses=_ANSWER)
    async def verdicts(
        request: Request,
        screening_id: ScreeningId,
        cursor: Cursor = None,
        wait_seconds: Annotated[float, Query(ge=0, le=300, description="How long to wait for further verdicts.")] = 0,
        accept: Annotated[str, Header()] = NDJSON,
        last_event_id: Annotated[str | None, Header()] = None,
    ) -> StreamingResponse:
        """Read verdicts in row order from the cursor, as NDJSON or server-sent events, then a trailer.

        The trailer's `done` is true once the screening is closed and every row has a verdict; otherwise continue
        from its `cursor`. Server-sent events resume with `Last-Event-ID`.
        """
        start = _start(cursor, last_event_id)
        state = await state_of(request, screening_id)
        events = EVENT_STREAM in accept

        async def refreshed() -> State:
            return await state_of(request, screening_id)

        stream = _verdicts(required_store(), state, refreshed, start, wait_seconds, events)
        return StreamingResponse(stream, media_type=EVENT_STREAM if events else NDJSON)

    return routes


async def _limits(context: FilterContext, state: State) -> Thresholds | None:
    """The thresholds of the whole screening; None for the teacher's own.

    Raises ApiError 409 when a new teacher's bounds no longer allow them.
    """
    about = state.about
    if about.review is None or about.block is None:
        return None
    try:
        return await context.thresholds(about.review, about.block)
    except ApiError as error:
        if error.status != 400:
            raise
        message = f"The teacher has changed since the screening was opened: {error.message}. Open a new screening."
        raise conflict(message, "thresholds_outdated") from None


async def _judged(
    context: FilterContext, limits: Thresholds | None, sequence: int, digest: str, body: bytes
) -> tuple[Chunk, bytes]:
    stream = VerdictStream(context, limits)
    async with aclosing(stream.records(_once(body))) as records:
        verdicts = b"".join([ndjson(batch) async for batch in records])
    tally = stream.tally
    counts = {outcome: tally.outcomes[outcome] for outcome in OUTCOMES}
    return Chunk(sequence, tally.rows, bytes=tally.bytes, sha256=digest, **counts), verdicts


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body


async def _verdicts(
    store: ScreeningStore,
    state: State,
    refreshed: Callable[[], Awaitable[State]],
    start: int,
    wait_seconds: float,
    events: bool,
) -> AsyncGenerator[bytes, None]:
    loop = asyncio.get_running_loop()
    until = loop.time() + wait_seconds
    sequence = first = 0
    cursor = start
    while True:
        while (chunk := state.chunks.get(sequence)) is not None:
            if first + chunk.rows > start:
                lines = (await asyncio.to_thread(store.verdicts, state, chunk)).splitlines()
                for piece in range(0, len(lines), PIECE_ROWS):
                    yield _numbered(lines[piece : piece + PIECE_ROWS], first, start, events)
                cursor = first + chunk.rows
                until = loop.time() + wait_seconds
            first += chunk.rows
            sequence += 1
        if state.complete or loop.time() >= until:
            break
        await asyncio.sleep(POLL_SECONDS)
        state = await refreshed()
    totals = _totals(state)
    trailer = {"type": "trailer", "done": state.complete, "cursor": max(cursor, start), "rows": first, **totals}
    yield _event("trailer", None, json.dumps(trailer)) if events else ndjson([trailer])


def _numbered(lines: list[bytes], first: int, start: int, events: bool) -> bytes:
    """Stored verdicts from row `start` on, with the dataset's row numbers; only those are parsed."""
    out = []
    for line in lines:
        head, number, rest = _NUMBERED.match(line).groups()  # type: ignore[union-attr]
        row = int(number) + first
        if row >= start:
            text = b"%s%d%s" % (head, row, rest)
            out.append(_event("verdict", row, text.decode()) if events else text + b"\n")
    return b"".join(out)


def _event(name: str, row: int | None, data: str) -> bytes:
    identity = "" if row is None else f"id: {row}\n"
    return f"{identity}event: {name}\ndata: {data}\n\n".encode()


def _start(cursor: int | None, last_event_id: str | None) -> int:
    if cursor is not None:
        return cursor
    if last_event_id is None:
        return 0
    if not last_event_id.isdecimal() or len(last_event_id) > 18:
        raise invalid("Last-Event-ID must be the number of the last row read", "last-event-id")
    return int(last_event_id) + 1


def _totals(state: State) -> dict[str, int]:
    totals = dict.fromkeys(OUTCOMES, 0)
    for chunk in state.contiguous():
        for outcome, rows in chunk.counts.items():
            totals[outcome] += rows
    return totals


def _public(state: State) -> Screening:
    about = state.about
    limits = None
    if about.review is not None and about.block is not None:
        limits = {"review": about.review, "block": about.block}
    return Screening(
        id=about.id,
        status="open" if state.closed is None else "closed",
        created_at=about.created_at,
        expires_at=about.expires_at,
        chunks=len(state.chunks),
        next_chunk=state.next_chunk,
        rows=sum(chunk.rows for chunk in state.chunks.values()),
        bytes=sum(chunk.bytes for chunk in state.chunks.values()),
        counts=Counts(**_totals(state)),
        thresholds=limits,
        metadata=about.metadata,
    )


def _receipt(chunk: Chunk, duplicate: bool) -> ChunkReceipt:
    return ChunkReceipt(
        sequence=chunk.sequence,
        rows=chunk.rows,
        counts=Counts(**chunk.counts),
        sha256=chunk.sha256,
        duplicate=duplicate,
    )
