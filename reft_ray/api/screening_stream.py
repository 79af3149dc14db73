"""`POST /v1/screenings`: a dataset in one request; verdicts stream back while the upload is still running."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from reft_ray.api.context import FilterContext, charge, owner_of
from reft_ray.api.errors import ApiError, busy
from reft_ray.api.schema import Threshold
from reft_ray.api.shares import Shares
from reft_ray.api.verdict_stream import JSONL_BODY, NDJSON, VerdictStream, error_record, ndjson, read_body
from reft_ray.telemetry import catalog

CHARGED_BYTES = 1 << 16
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "One verdict per row in input order, then a trailer.", "content": {NDJSON: {}}}
}


class DuplexResponse(StreamingResponse):
    """A response that is sent while its request is still being received.

    Starlette's own detects a disconnect by calling `receive`, which takes pieces of the upload (Serve speaks ASGI 2.3).
    """

    def __init__(self, body: AsyncGenerator[bytes, None], release: Callable[[], None]) -> None:
        super().__init__(body, media_type=NDJSON)
        self._body = body
        self._release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the body; in every case close its generator and call `release`."""
        try:
            await self.stream_response(send)
        finally:
            # Not in the generator: one that was never started would not run its clean-up.
            self._release()
            await self._body.aclose()


def router(context: FilterContext) -> APIRouter:
    """The route of one-request screenings."""
    routes = APIRouter(tags=["screenings"])
    slots = Shares(context.settings.max_streams, context.settings.max_streams_per_project)

    @routes.post(
        "/screenings", response_class=StreamingResponse, responses=_RESPONSES, openapi_extra={"requestBody": JSONL_BODY}
    )
    async def screen(
        request: Request,
        review: Annotated[Threshold | None, Query(description="A stricter review threshold.")] = None,
        block: Annotated[Threshold | None, Query(description="A stricter block threshold.")] = None,
    ) -> StreamingResponse:
        """Screen a JSONL body in one request; the first verdict comes before the upload has ended."""
        limit = context.settings.max_upload_bytes
        too_large = (
            f"A streamed dataset may have {limit:,} bytes. Send larger ones in chunks: POST /v1/screenings/resumable, "
            "or `reft-ray screen --url`."
        )
        try:
            body = read_body(request, limit, context.settings.idle_seconds, too_large)
        except ApiError:
            context.recorder.count(catalog.FILTER_SHED, reason="too_large")
            raise
        thresholds = await context.thresholds(review, block)
        owner = owner_of(request)
        if not slots.take(owner):
            context.recorder.count(catalog.FILTER_SHED, reason="queue_full")
            raise busy("As many datasets are being screened as may be at once; try again later.", 5)
        lines = _lines(context, VerdictStream(context, thresholds), _charged(request, body))
        return DuplexResponse(lines, lambda: slots.give(owner))

    return routes


async def _charged(request: Request, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The body, charged in steps: a slow stream costs no call per row."""
    due = 0
    async for piece in body:
        due += len(piece)
        if due >= CHARGED_BYTES:
            await charge(request, due)
            due = 0
        yield piece
    await charge(request, due)


async def _lines(
    context: FilterContext, stream: VerdictStream, body: AsyncIterator[bytes]
) -> AsyncGenerator[bytes, None]:
    """Verdict lines, then a trailer; an error becomes a record before the trailer."""
    tally = stream.tally
    done = False
    with context.timed("screening"):
        try:
            async with aclosing(stream.records(body)) as records:
                async for batch in records:
                    yield ndjson(batch)
            done = True
        except ApiError as error:
            yield ndjson([error_record(error, tally.answered)])
        except ClientDisconnect:
            interrupted = ApiError(400, "The upload was interrupted.", code="upload_truncated")
            yield ndjson([error_record(interrupted, tally.answered)])
    if done and tally.answered != tally.rows:
        context.recorder.count(catalog.UNACCOUNTED_ROWS, abs(tally.rows - tally.answered), where="stream")
    yield ndjson([tally.trailer(done)])
