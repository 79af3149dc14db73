"""An HTTP client of a running service, for commands and programs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from reft_ray.api.http_retry import error_message
from reft_ray.core.errors import ReftError, UsageError


class Remote:
    """A service at `url` (with `/v1`), for a `with` block. Methods raise ReftError with the service's message."""

    def __init__(self, url: str, key: str) -> None:
        if not (key.isascii() and key.isprintable()):
            raise UsageError("--key: a key contains only printable ASCII characters; copy it again")
        self._url = url.rstrip("/")
        self._client = httpx.Client(headers={"authorization": f"Bearer {key}"}, timeout=600)

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def get(self, path: str, **query: Any) -> Any:
        """Get the JSON at a path."""
        params = {name: value for name, value in query.items() if value is not None}
        return self._send("GET", path, params=params).json()

    def post(self, path: str, **options: Any) -> Any:
        """Post and return the JSON of the response."""
        return self._send("POST", path, **options).json()

    def delete(self, path: str) -> Any:
        """Delete and return the JSON of the response."""
        return self._send("DELETE", path).json()

    def pages(self, path: str, **query: Any) -> Iterator[dict[str, Any]]:
        """All items of a list with cursor pagination."""
        after = None
        while True:
            page = self.get(path, after=after, **query)
            yield from page["data"]
            if not page.get("has_more"):
                return
            after = page["data"][-1]["id"]

    def download(self, path: str) -> Iterator[bytes]:
        """The bytes at a path."""
        with self._connection_errors(), self._client.stream("GET", f"{self._url}{path}") as answer:
            if answer.is_error:
                answer.read()
                raise _error(answer)
            yield from answer.iter_bytes()

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        with self._connection_errors():
            answer = self._client.request(method, f"{self._url}{path}", **options)
        if answer.is_error:
            raise _error(answer)
        return answer

    @contextmanager
    def _connection_errors(self) -> Iterator[None]:
        try:
            yield
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ReftError(f"{self._url}: {error}; is the service running? (reft-ray serve)") from None


def _error(answer: httpx.Response) -> ReftError:
    return ReftError(error_message(answer, f"{answer.request.url}: HTTP {answer.status_code}"))
