"""HTTP requests that are repeated after lost connections and transient errors, for clients of OpenAI's API."""

from __future__ import annotations

import math
import time
from typing import Any

import httpx

RETRIED_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
LONGEST_PAUSE = 10.0


def send(
    client: httpx.Client,
    method: str,
    url: str,
    *,
    attempts: float = math.inf,
    seconds: float = math.inf,
    pause: float = 0.5,
    **request: Any,
) -> httpx.Response:
    """The first response that need not be repeated, or that of the last attempt.

    No attempt starts after `seconds`. `pause` doubles after each attempt; a longer `retry-after` is respected.
    Raises httpx.TransportError when the last attempt lost the connection.
    """
    until = time.monotonic() + seconds
    attempt = 1
    while True:
        wait, last = pause, attempt >= attempts
        try:
            response = client.request(method, url, **request)
        except httpx.TransportError:
            if last or time.monotonic() >= until:
                raise
        else:
            if last or time.monotonic() >= until or not is_transient(response):
                return response
            wait = max(pause, _retry_after(response))
        time.sleep(min(wait, LONGEST_PAUSE))
        attempt, pause = attempt + 1, min(2 * pause, LONGEST_PAUSE)


def is_transient(response: httpx.Response) -> bool:
    """Whether to repeat the request: by the server's `x-should-retry`, as OpenAI's client does, or by the status."""
    match response.headers.get("x-should-retry"):
        case "true":
            return True
        case "false":
            return False
    return response.status_code in RETRIED_STATUSES


def error_message(response: httpx.Response, otherwise: str) -> str:
    """The message of OpenAI's error envelope, or `otherwise` where there is none."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return otherwise


def _retry_after(response: httpx.Response) -> float:
    value = response.headers.get("retry-after", "")
    return float(value) if value.isdecimal() else 0.0
