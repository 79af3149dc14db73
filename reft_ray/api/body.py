"""Bodies of requests within their limits: bytes, time, and the size and depth of JSON."""

from __future__ import annotations

import asyncio
import re

from starlette.requests import HTTPConnection
from starlette.types import Message, Receive

from reft_ray.api.errors import ApiError, invalid, too_large

LEAST_RATE = 1024
"""Bytes per second that a body must have on average, in addition to the time that it may be silent."""

JSON_DEPTH = 32

# A string counts once, whatever it holds. Possessive, so that no input is read twice.
_TOKENS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{},]', re.DOTALL)


def declared_bytes(request: HTTPConnection) -> int:
    """The length that the client declares for its body; 0 where it declares none."""
    length = request.headers.get("content-length", "")
    if not length.isdecimal():
        return 0
    return int(length) if len(length) <= 15 else 1 << 60


def paced(receive: Receive, idle_seconds: float, limit: int | None = None) -> Receive:
    """`receive` for a body of up to `limit` bytes from a client that keeps sending.

    Raises ApiError: 408 after `idle_seconds` without a byte, or when the client was waited for longer than that and
    sent less than LEAST_RATE; 413 above the limit. Time that we take ourselves does not count.
    """
    clock = asyncio.get_running_loop().time
    seen, waited, ended = 0, 0.0, False

    async def within() -> Message:
        nonlocal seen, waited, ended
        if ended:
            return await receive()  # the client's leaving, for which a long answer waits
        started = clock()
        try:
            async with asyncio.timeout(min(idle_seconds, idle_seconds + seen / LEAST_RATE - waited)):
                message = await receive()
        except TimeoutError:
            raise ApiError(408, f"The body arrives too slowly: up to {idle_seconds:g} s without progress are allowed.",
                           code="upload_stalled") from None  # fmt: skip
        waited += clock() - started
        if message["type"] == "http.request":
            seen += len(message.get("body", b""))
            ended = not message.get("more_body", False)
            if limit is not None and seen > limit:
                raise too_large(f"The body exceeds the limit of {limit:,} bytes.")
        return message

    return within


async def read_json(receive: Receive, values: int) -> tuple[bytes, bool]:
    """A whole body whose JSON is bounded, and whether it is complete: False after the client disconnected.

    Raises ApiError 400 for more `values` or more depth, before any of it is parsed.
    """
    pieces = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b"", False
        pieces.append(message.get("body", b""))
        if not message.get("more_body", False):
            body = b"".join(pieces)
            check_json(body, values)
            return body, True


def check_json(body: bytes, values: int, depth: int = JSON_DEPTH) -> None:
    """Raise ApiError 400 for JSON with more `values` (strings, commas and brackets), or nested deeper than `depth`."""
    level = 0
    for count, token in enumerate(_TOKENS.finditer(body), 1):
        if count > values:
            raise invalid(f"The body has more than {values:,} JSON values.")
        first = body[token.start()]
        if first in b"[{":
            level += 1
            if level > depth:
                raise invalid(f"The body is nested deeper than {depth} levels.")
        elif first in b"]}":
            level -= 1


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was already read, then what follows it."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
