"""Uploads of any size, screened while they arrive by a Ray Data pipeline that asks a Serve filter for its verdicts.

Ray Serve's own HTTP proxy holds a whole body in memory, so this application belongs into a plain ASGI server on a
machine of the cluster, after what authenticates its callers: `uvicorn.run(upload_app("reft"), port=8100)`.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from typing import Any

import orjson
import pyarrow as pa
from ray.data import ActorPoolStrategy
from starlette.applications import Starlette
from starlette.concurrency import iterate_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from reft_ray.api.errors import ApiError, busy
from reft_ray.api.screening_stream import DuplexResponse
from reft_ray.api.shares import Shares
from reft_ray.api.verdict_stream import Tally, error_record, ndjson, read_body
from reft_ray.core.errors import ReftError
from reft_ray.data.arriving import arriving_rows
from reft_ray.data.moderate import VERDICT, Moderate

MAX_BYTES = 1 << 40
IDLE_SECONDS = 60.0


def upload_app(
    application: str | None = None,
    *,
    judge: Mapping[str, Any] | None = None,
    actors: int = 1,
    most: int = 4,
    max_bytes: int = MAX_BYTES,
    idle_seconds: float = IDLE_SECONDS,
) -> Starlette:
    """An ASGI application with the route `POST /v1/screenings`: JSONL of any size in, a verdict for each row out.

    The verdicts are those of the Serve `application` on this cluster, or of the `judge`: keyword arguments of
    `Moderate`. Each upload has its own pipeline with `actors` that ask for verdicts; `most` run at once, and further
    ones get 429. An upload of more than `max_bytes` gets 413, one that stops for `idle_seconds` ends with an error.

    Answers have the records of the filter's route of this name: verdicts in the order of the lines, an error if there
    is one, and a trailer. `row` counts lines from 0, and blank lines have no verdict.
    """
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    judging = dict(judge or {"application": application})
    slots = Shares(most, most)

    async def screen(request: Request) -> Response:
        try:
            body = read_body(request, max_bytes, idle_seconds, f"An upload may have {max_bytes:,} bytes.")
            if not slots.take(None):
                raise busy("As many uploads are being screened as may be at once; try again later.", 5)
        except ApiError as error:
            return JSONResponse(error.body(), error.status, error.headers)
        tally = Tally()

        async def counted() -> AsyncIterator[bytes]:
            async for piece in body:
                tally.bytes += len(piece)
                yield piece

        def verdicts() -> AsyncIterator[pa.Table]:
            judged = arriving_rows(counted(), judging=True, num_cpus=0).map_batches(
                Moderate,
                fn_constructor_kwargs=judging,
                batch_format="pyarrow",
                batch_size=None,
                compute=ActorPoolStrategy(size=actors),
                num_cpus=0,
            )
            judged.context.execution_options.preserve_order = True
            judged.context.enable_progress_bars = False
            return iterate_in_threadpool(judged.iter_batches(batch_size=None, batch_format="pyarrow"))

        return DuplexResponse(_lines(verdicts, tally), lambda: slots.give(None))

    return Starlette(routes=[Route("/v1/screenings", screen, methods=["POST"])])


async def _lines(verdicts: Callable[[], AsyncIterator[pa.Table]], tally: Tally) -> AsyncGenerator[bytes, None]:
    done = False
    try:
        async for batch in verdicts():
            yield ndjson(_records(batch, tally))
        done = True
    except ReftError as error:
        yield ndjson([error_record(ApiError(400, str(error), code="upload_failed"), tally.rows)])
    except Exception:
        # Not its text: Ray's names machines and paths.
        failed = ApiError(500, "The pipeline failed; no later row was judged.", code="pipeline_failed")
        yield ndjson([error_record(failed, tally.rows)])
    yield ndjson([tally.trailer(done)])


def _records(batch: pa.Table, tally: Tally) -> Iterator[dict[str, Any]]:
    for row in batch.select(["line", "faults", *VERDICT.names]).to_pylist():
        number, faults = row.pop("line") - 1, row.pop("faults")
        if faults:
            first = orjson.loads(faults)[0]
            row = {"decision": row["decision"], "reason": {"code": first["code"], "message": first["message"]}}
        else:
            tally.teachers[row["teacher"]] = None
        tally.rows += 1
        tally.outcomes[row["decision"]] += 1
        yield {"type": "verdict", "row": number, **row}
