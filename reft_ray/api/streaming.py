"""`POST /v1/screenings`: JSONL up, NDJSON verdicts down, both at once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from reft_ray.api.context import Filter
from reft_ray.api.errors import ApiError, busy, invalid, too_large
from reft_ray.api.schema import Threshold
from reft_ray.api.verdict_stream import Screening, error_record
from reft_ray.core.verdict import Thresholds
from reft_ray.telemetry import catalog

NDJSON = "application/x-ndjson"
_BODY = {"content": {"application/jsonl": {"schema": {"type": "string", "format": "binary"}}}, "required": True}
_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {"description": "One verdict per row in input order, then a trailer.", "content": {NDJSON: {}}}
}


class Duplex(StreamingResponse):
    """A response that flows while its request is still being read.

    Starlette's own listens for a disconnect by receiving, which steals pieces of the upload (Serve speaks ASGI 2.3).
    """

    def __init__(self, body: AsyncGenerator[bytes, None], release: Callable[[], None]) -> None:
        super().__init__(body, media_type=NDJSON)
        self._body = body
        self._release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the body; end what produces it and call `release`, whatever happens."""
        try:
            await self.stream_response(send)
        finally:
            # Not by the generator itself: one that was never started would not run its own clean-up.
            self._release()
            await self._body.aclose()


def router(guard: Filter) -> APIRouter:
    """The streaming route."""
    routes = APIRouter(tags=["screenings"])
    slots = Slots(guard.settings.max_streams)

    @routes.post(
        "/screenings", response_class=StreamingResponse, responses=_ANSWER, openapi_extra={"requestBody": _BODY}
    )
    async def screen(
        request: Request,
        review: Annotated[Threshold | None, Query(description="A stricter review threshold.")] = None,
        block: Annotated[Threshold | None, Query(description="A stricter block threshold.")] = None,
    ) -> StreamingResponse:
        """Screen a JSONL body in one go; the first verdict comes before the upload has ended."""
        cap = guard.settings.max_upload_bytes
        length = request.headers.get("content-length", "")
        if request.headers.get("content-encoding", "identity") != "identity":
            raise invalid("compressed bodies are not taken here: send plain JSONL", "content-encoding")
        if length.isdecimal() and int(length) > cap:
            guard.recorder.count(catalog.FILTER_SHED, reason="too_large")
            raise too_large(_too_large(cap))
        thresholds = await guard.thresholds(review, block)
        if not slots.take():
            guard.recorder.count(catalog.FILTER_SHED, reason="queue_full")
            raise busy(f"{slots.size} datasets are being screened already; try again later.", 5)
        return Duplex(_screened(guard, request, thresholds, cap), slots.give)

    return routes


async def _screened(
    guard: Filter, request: Request, thresholds: Thresholds | None, cap: int
) -> AsyncGenerator[bytes, None]:
    """Verdict lines, then a trailer; an error on the way is a record before the trailer."""
    screening = Screening(guard, thresholds)
    records = screening.records(_bounded(request, cap, guard.settings.idle_seconds))
    done = False
    with guard.timed("screening"):
        try:
            async for batch in records:
                yield ndjson(batch)
            done = True
        except ApiError as error:
            yield ndjson([error_record(error, screening.tally.answered)])
        finally:
            await records.aclose()
    tally = screening.tally
    if done and tally.answered != tally.rows:
        guard.recorder.count(catalog.UNACCOUNTED_ROWS, abs(tally.rows - tally.answered), where="stream")
    yield ndjson([tally.trailer(done)])


async def _bounded(request: Request, cap: int, idle_seconds: float) -> AsyncIterator[bytes]:
    """The body, chunk by chunk. Raises ApiError past the cap and after a silence."""
    seen = 0
    stream = request.stream()
    while True:
        try:
            async with asyncio.timeout(idle_seconds):
                chunk = await anext(stream, None)
        except TimeoutError:
            raise ApiError(408, f"The upload was silent for {idle_seconds:g} s.", code="upload_stalled") from None
        except ClientDisconnect:
            raise ApiError(400, "The upload broke off.", code="upload_truncated") from None
        if chunk is None:
            return
        seen += len(chunk)
        if seen > cap:
            raise too_large(_too_large(cap))
        yield chunk


def _too_large(cap: int) -> str:
    return (
        f"A streamed dataset may have {cap:,} bytes. Send larger ones in chunks: POST /v1/screenings/resumable, or "
        "`reft-ray screen --url`."
    )


def ndjson(records: Iterable[dict[str, Any]]) -> bytes:
    """Records as lines."""
    return b"".join(json.dumps(record, separators=(",", ":")).encode() + b"\n" for record in records)


class Slots:
    """A fixed number of places; no waiting."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._taken = 0

    def take(self) -> bool:
        """Whether there was a place."""
        if self._taken >= self.size:
            return False
        self._taken += 1
        return True

    def give(self) -> None:
        """Free a place."""
        self._taken -= 1
