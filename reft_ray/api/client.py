"""A client for screening datasets of any size at a running service."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx

from reft_ray.api.settings import MIB
from reft_ray.core.errors import ReftError

Progress = Callable[[int, int], None]
"""Hears the rows with verdicts and the bytes sent so far."""

_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
_LONGEST_PAUSE = 10.0


class ScreeningError(ReftError):
    """The service refused, or could not be reached within the client's patience."""


class ScreeningClient:
    """Sends rows in numbered chunks and reads their verdicts; both survive lost connections and restarts.

    `patience` bounds the seconds that one chunk, or one reading, is tried again. Memory is bounded by `parallel`
    chunks of `chunk_bytes`.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        chunk_bytes: int = MIB,
        parallel: int = 3,
        patience: float = 300.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        # A chunk is judged before it is answered, so reading an answer may take as long as judging.
        timeout = httpx.Timeout(120.0, connect=5.0)
        base = url.rstrip("/").removesuffix("/v1")
        self._http = httpx.Client(base_url=f"{base}/v1", headers=headers, timeout=timeout, transport=transport)
        self._chunk_bytes = chunk_bytes
        self._parallel = parallel
        self._patience = patience

    def __enter__(self) -> ScreeningClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def teacher(self) -> dict[str, Any]:
        """The teacher that answers. Raises ScreeningError."""
        return self._json("GET", "/teacher")

    def screen(
        self,
        rows: Iterable[bytes],
        progress: Progress = lambda rows, sent: None,
        *,
        review: float | None = None,
        block: float | None = None,
    ) -> Iterator[dict[str, Any]]:
        """One verdict per row, in order; rows are lines of JSONL, with or without their ends.

        Raises ScreeningError when verdicts are missing at the end, whatever the reason. The verdicts at the service
        are deleted when all have been read; those of a broken run expire there.
        """
        override = {name: value for name, value in (("review", review), ("block", block)) if value is not None}
        screening = self._json("POST", "/screenings/resumable", {"reft": override} if override else {})
        path = f"/screenings/{screening['id']}"
        sent = chunks = sent_rows = read = 0
        flying: deque[Future[dict[str, Any]]] = deque()
        oversize: set[int] = set()
        with ThreadPoolExecutor(self._parallel) as pool:
            try:
                for body, count, large in self._chunks(rows):
                    oversize |= {sent_rows + index for index in large}
                    flying.append(pool.submit(self._send, f"{path}/chunks/{chunks}", body))
                    chunks, sent, sent_rows = chunks + 1, sent + len(body), sent_rows + count
                    if len(flying) >= self._parallel:
                        landed = read + _rows(flying.popleft())
                        for verdict in self._read(path, read, landed, oversize):
                            read += 1
                            yield verdict
                        progress(read, sent)
                self._json("POST", f"{path}/close", {"chunks": chunks})
                while flying:
                    landed = read + _rows(flying.popleft())
                    for verdict in self._read(path, read, landed, oversize):
                        read += 1
                        yield verdict
                    progress(read, sent)
            finally:
                for future in flying:
                    future.cancel()
        final = self._json("GET", path)
        if not (final["rows"] == sent_rows == read and final["next_chunk"] == chunks):
            raise ScreeningError(f"{sent_rows} rows were sent, the service counts {final['rows']}, {read} were read")
        with suppress(ScreeningError):
            # Nothing is lost when this fails: the service forgets it in time.
            self._json("DELETE", path)

    def _chunks(self, rows: Iterable[bytes]) -> Iterator[tuple[bytes, int, list[int]]]:
        """Bodies of whole lines with their number of rows, and the places of rows that are too large to send."""
        body = bytearray()
        count = 0
        large: list[int] = []
        for row in rows:
            line = row.rstrip(b"\r\n")
            if b"\n" in line:
                raise ScreeningError("a row holds a line break: send one line of JSONL per row")
            if len(body) + len(line) + 1 > self._chunk_bytes and count and len(line) < self._chunk_bytes:
                yield bytes(body), count, large
                body, count, large = bytearray(), 0, []
            if len(line) >= self._chunk_bytes:
                # An empty line keeps its place, so that the rows behind it keep their numbers.
                large.append(count)
                line = b""
            body += line + b"\n"
            count += 1
        if count:
            yield bytes(body), count, large

    def _send(self, path: str, body: bytes) -> dict[str, Any]:
        return self._json("PUT", path, content=body)

    def _read(self, path: str, start: int, end: int, oversize: set[int]) -> Iterator[dict[str, Any]]:
        """Verdicts from row `start` up to `end`, reading on after every interruption."""
        until = time.monotonic() + self._patience
        row = start
        pause = 0.1
        while row < end:
            try:
                with self._http.stream("GET", f"{path}/verdicts", params={"cursor": row}) as response:
                    if response.status_code != 200:
                        response.read()
                        self._refuse(response, until)
                    for line in response.iter_lines() if response.status_code == 200 else ():
                        record = json.loads(line)
                        if record["type"] != "verdict" or row >= end:
                            break
                        if record["row"] != row:
                            raise ScreeningError(f"row {row} was expected, row {record['row']} came")
                        if row in oversize:
                            oversize.discard(row)
                            message = f"the row has {self._chunk_bytes:,} bytes or more"
                            record["reason"] = {"code": "row_too_long", "message": message}
                        row += 1
                        pause = 0.1
                        until = time.monotonic() + self._patience
                        yield record
            except (httpx.TransportError, json.JSONDecodeError) as error:
                # A line that is cut off is no JSON: the connection broke in the middle of it.
                self._give_up(until, error)
            if row < end:
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
                self._give_up(until, None)

    def _json(
        self, method: str, path: str, body: dict[str, Any] | None = None, content: bytes | None = None
    ) -> dict[str, Any]:
        """The answer to a request that may be repeated."""
        until = time.monotonic() + self._patience
        pause = 0.1
        while True:
            try:
                response = self._http.request(method, path, json=body, content=content)
            except httpx.TransportError as error:
                self._give_up(until, error)
                wait = pause
            else:
                if response.is_success:
                    answer: dict[str, Any] = response.json()
                    return answer
                self._refuse(response, until)
                wait = max(pause, _retry_after(response))
            time.sleep(min(wait, _LONGEST_PAUSE))
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _refuse(self, response: httpx.Response, until: float) -> None:
        """Raises ScreeningError unless the request is worth repeating."""
        if response.status_code not in _RETRIED or time.monotonic() >= until:
            raise ScreeningError(f"{response.request.url} answered {response.status_code}: {_message(response)}")

    def _give_up(self, until: float, error: Exception | None) -> None:
        if time.monotonic() >= until:
            raise ScreeningError(f"{self._http.base_url} did not answer for {self._patience:g} s: {error}") from error


def _rows(receipt: Future[dict[str, Any]]) -> int:
    return int(receipt.result()["rows"])


def _retry_after(response: httpx.Response) -> float:
    value = response.headers.get("retry-after", "")
    return float(value) if value.isdecimal() else 0.0


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200]
