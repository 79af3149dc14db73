"""Requests to the upstream service, and what the operator of the proxy may set."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal, Self

import httpx
from fastapi import Request
from fastapi.responses import Response
from pydantic import Field, model_validator

from reft_ray.api.errors import ApiError
from reft_ray.jobs.files import MAX_FILE_BYTES
from reft_ray.settings import Settings


class ProxySettings(Settings):
    """The proxy's settings. Sizes in bytes, times in seconds.

    - `policy` `filter` forwards the kept rows of a training file; `fail` refuses a file with a withheld or invalid row.
      Above `max_reject_ratio` withheld among valid rows a file is refused in any case.
    - `upstream_key` replaces the key of clients, who then need `client_key`, unless they are on this machine. Without
      it the proxy admits the callers that the upstream admits.
    """

    upstream: str = Field(pattern=r"^https?://", description="With /v1.")
    state: str = Field(min_length=1, description="A directory for the evidence of screened files.")
    policy: Literal["filter", "fail"] = "filter"
    max_reject_ratio: float = Field(0.5, ge=0, le=1)
    max_file_bytes: int = Field(MAX_FILE_BYTES, ge=1024)
    max_answer_bytes: int = Field(8 << 20, ge=1024, description="The longest answer that is judged.")
    upstream_seconds: float = Field(600.0, gt=0)
    judging_seconds: float = Field(30.0, gt=0)
    upstream_key: str | None = None
    client_key: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.client_key is not None and self.upstream_key is None:
            raise ValueError("a client key needs an upstream key: the upstream does not know the client's")
        return self


CREDENTIALS = ("authorization", "api-key", "openai-organization", "openai-project")
_REQUEST = (*CREDENTIALS, "openai-beta", "idempotency-key", "user-agent", "accept")
_RESPONSE = ("content-type", "content-disposition", "retry-after", "retry-after-ms", "x-should-retry")


class Upstream:
    """A client of the service. What fails on the way to it is a 502."""

    def __init__(self, settings: ProxySettings) -> None:
        self._url = settings.upstream.rstrip("/")
        self._key = settings.upstream_key
        timeout = httpx.Timeout(settings.upstream_seconds, connect=10.0)
        # Redirects are not followed: they would carry the key elsewhere.
        self._client = httpx.AsyncClient(timeout=timeout)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def send(self, request: Request, method: str, path: str, **content: Any) -> httpx.Response:
        """A whole response, for `request`'s caller. `path` is below the upstream's URL."""
        async with self.stream(request, method, path, **content) as response:
            await response.aread()
            return response

    @asynccontextmanager
    async def stream(self, request: Request, method: str, path: str, **content: Any) -> AsyncIterator[httpx.Response]:
        """A response whose body is still to be read."""
        headers = {name: request.headers[name] for name in _REQUEST if name in request.headers}
        if self._key is not None:
            headers.pop("api-key", None)
            headers["authorization"] = f"Bearer {self._key}"
        try:
            async with self._client.stream(method, f"{self._url}{path}", headers=headers, **content) as response:
                yield response
        except httpx.HTTPError as error:
            raise unanswered(error) from None


def unanswered(error: httpx.HTTPError) -> ApiError:
    """502: the request did not reach the upstream, or its answer was lost."""
    message = f"The upstream service did not answer ({type(error).__name__})."
    return ApiError(502, message, code="upstream_unavailable")


def relayed(response: httpx.Response, content: bytes | dict[str, Any] | None = None) -> Response:
    """The upstream's response as ours, with other content where it is given."""
    headers = {
        name: value
        for name, value in response.headers.items()
        if name in _RESPONSE or name.startswith(("x-ratelimit-", "openai-"))
    }
    if "x-request-id" in response.headers:
        headers["x-upstream-request-id"] = response.headers["x-request-id"]
    body = json.dumps(content).encode() if isinstance(content, dict) else content
    return Response(response.content if body is None else body, response.status_code, headers)


def document_of(content: bytes) -> dict[str, Any]:
    """The JSON object of a response's content. Raises ApiError 502."""
    try:
        document = json.loads(content)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise ApiError(502, "The upstream service did not answer with a JSON object.", code="upstream_invalid")
    return document
