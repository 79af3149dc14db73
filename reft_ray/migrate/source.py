"""Files and jobs of an organisation at OpenAI, or at any service with its API."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import httpx

from reft_ray.api.http_retry import error_message, send
from reft_ray.atomic import atomic_write
from reft_ray.core.errors import ReftError

PAGE = 100
ATTEMPTS = 5


class OpenAISource:
    """A reader of `url` (with /v1). Raises ReftError with the service's own message."""

    def __init__(self, url: str, key: str, pause: float = 1.0) -> None:
        headers = {"authorization": f"Bearer {key}"}
        self._http = httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=httpx.Timeout(600.0, connect=10.0))
        self._pause = pause

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def files(self) -> list[dict[str, Any]]:
        """All training files, newest first."""
        return list(self._pages("/files", {"purpose": "fine-tune"}))

    def jobs(self) -> list[dict[str, Any]]:
        """All jobs, newest first."""
        return list(self._pages("/fine_tuning/jobs", {}))

    def download(self, file_id: str, path: Path) -> None:
        """Write a file's content to a path."""
        try:
            with (
                self._http.stream("GET", f"/files/{file_id}/content") as response,
                atomic_write(path) as scratch,
                scratch.open("wb") as out,
            ):
                if response.is_error:
                    response.read()
                    raise self._failure(response)
                for piece in response.iter_bytes():
                    out.write(piece)
        except httpx.HTTPError as error:
            raise ReftError(f"{self._http.base_url}: {type(error).__name__} while {file_id} was read") from None

    def _pages(self, path: str, query: dict[str, Any]) -> Iterator[dict[str, Any]]:
        after: dict[str, Any] = {}
        while True:
            page = self._page(path, {**query, "limit": PAGE, **after})
            items = page.get("data") or []
            yield from items
            if not items or not page.get("has_more"):
                return
            after = {"after": items[-1]["id"]}

    def _page(self, path: str, query: dict[str, Any]) -> dict[str, Any]:
        try:
            response = send(self._http, "GET", path, attempts=ATTEMPTS, pause=self._pause, params=query)
        except httpx.TransportError as error:
            raise ReftError(f"{self._http.base_url}: {type(error).__name__}") from None
        if response.is_error:
            raise self._failure(response)
        try:
            found = response.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ReftError(f"{self._http.base_url}{path.lstrip('/')} did not answer with a JSON object")
        return found

    def _failure(self, response: httpx.Response) -> ReftError:
        message = error_message(response, f"HTTP {response.status_code}")
        return ReftError(f"{response.request.url.copy_with(query=None)}: {message}")
