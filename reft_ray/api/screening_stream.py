"""`POST /v1/screenings`: a dataset in one request; verdicts stream back while the upload is still running."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from reft_ray.api.context import FilterContext
from reft_ray.api.errors import ApiError, busy, invalid
from reft_ray.api.schema import Threshold
from reft_ray.api.verdict_stream import JSONL_BODY, NDJSON, Slots, VerdictStream, error_record, ndjson, read_body
from reft_ray.telemetry import catalog

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
    slots = Slots(context.settings.max_streams)

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
        if request.headers.get("content-encoding", "identity") != "identity":
            raise invalid("Compressed bodies are not supported: send plain JSONL.", "content-encoding")
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
        if not slots.take():
            context.recorder.count(catalog.FILTER_SHED, reason="queue_full")
            raise busy(f"{slots.size} datasets are already being screened; try again later.", 5)
        return DuplexResponse(_lines(context, VerdictStream(context, thresholds), body), slots.give)

    return routes


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
