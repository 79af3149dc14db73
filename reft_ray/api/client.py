"""A client that screens datasets of any size with a running service."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import httpx

from reft_ray.api.http_retry import LONGEST_PAUSE, error_message, is_transient, send
from reft_ray.api.settings import MIB
from reft_ray.core.errors import ReftError

Progress = Callable[[int, int], None]
"""Receives the number of rows with verdicts and of bytes sent so far."""

_FIRST_PAUSE = 0.1
CHUNK_ROWS = 10_000


class ScreeningError(ReftError):
    """The service rejected a request, or could not be reached within the client's patience."""


class ScreeningClient:
    """Sends rows in numbered chunks and reads their verdicts; both survive lost connections and restarts.

    `patience`: seconds for which one chunk, or one read, is retried. Memory is bounded by `parallel` chunks of
    `chunk_bytes`.
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
        # A chunk is judged before the response, so the read timeout includes judging.
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
        """Describe the current teacher. Raises ScreeningError."""
        return self._json("GET", "/teacher")

    def screen(
        self,
        rows: Iterable[bytes],
        progress: Progress = lambda rows, sent: None,
        *,
        review: float | None = None,
        block: float | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Yield one verdict per row, in order; rows are lines of JSONL, with or without line ends.

        Raises ScreeningError when verdicts are missing at the end. The service's copy of the verdicts is deleted once
        all are read; that of an interrupted run expires.
        """
        override = {name: value for name, value in (("review", review), ("block", block)) if value is not None}
        screening = self._json("POST", "/screenings/resumable", {"reft": override} if override else {})
        path = f"/screenings/{screening['id']}"
        sent = chunks = sent_rows = read = 0
        in_flight: deque[Future[dict[str, Any]]] = deque()
        oversize: set[int] = set()

        def verdicts(limit: int) -> Iterator[dict[str, Any]]:
            """Those of the oldest chunks, until `limit` chunks are in flight."""
            nonlocal read
            while len(in_flight) > limit:
                end = read + int(in_flight.popleft().result()["rows"])
                for verdict in self._read(path, read, end, oversize):
                    read += 1
                    yield verdict
                progress(read, sent)

        with ThreadPoolExecutor(self._parallel) as pool:
            try:
                for body, count, large in self._chunks(rows):
                    oversize |= {sent_rows + index for index in large}
                    in_flight.append(pool.submit(self._send, f"{path}/chunks/{chunks}", body))
                    chunks, sent, sent_rows = chunks + 1, sent + len(body), sent_rows + count
                    yield from verdicts(self._parallel - 1)
                self._json("POST", f"{path}/close", {"chunks": chunks})
                yield from verdicts(0)
            finally:
                for future in in_flight:
                    future.cancel()
        final = self._json("GET", path)
        if not (final["rows"] == sent_rows == read and final["next_chunk"] == chunks):
            raise ScreeningError(f"{sent_rows} rows were sent, the service counts {final['rows']}, {read} were read")
        with suppress(ScreeningError):
            # When this fails, the screening expires at the service.
            self._json("DELETE", path)

    def _chunks(self, rows: Iterable[bytes]) -> Iterator[tuple[bytes, int, list[int]]]:
        """Bodies of complete lines, their number of rows, and the indices of rows that are too large to send."""
        body = bytearray()
        count = 0
        large: list[int] = []
        for row in rows:
            line = row.rstrip(b"\r\n")
            if b"\n" in line:
                raise ScreeningError("a row contains a line break: send one line of JSONL per row")
            full = len(body) + len(line) + 1 > self._chunk_bytes and len(line) < self._chunk_bytes
            if count and (full or count >= CHUNK_ROWS):
                yield bytes(body), count, large
                body, count, large = bytearray(), 0, []
            if len(line) >= self._chunk_bytes:
                # An empty line takes its place, so that later rows keep their numbers.
                large.append(count)
                line = b""
            body += line + b"\n"
            count += 1
        if count:
            yield bytes(body), count, large

    def _send(self, path: str, body: bytes) -> dict[str, Any]:
        return self._json("PUT", path, content=body)

    def _read(self, path: str, start: int, end: int, oversize: set[int]) -> Iterator[dict[str, Any]]:
        """Read the verdicts of rows `start` to `end`, resuming after every interruption."""
        until = time.monotonic() + self._patience
        row = start
        pause = _FIRST_PAUSE
        while row < end:
            try:
                with self._http.stream("GET", f"{path}/verdicts", params={"cursor": row}) as response:
                    if response.status_code != 200:
                        response.read()
                        if not is_transient(response) or time.monotonic() >= until:
                            raise _refusal(response)
                    for line in response.iter_lines() if response.status_code == 200 else ():
                        record = json.loads(line)
                        if record["type"] != "verdict" or row >= end:
                            break
                        if record["row"] != row:
                            raise ScreeningError(f"expected row {row}, received row {record['row']}")
                        if row in oversize:
                            oversize.discard(row)
                            message = f"the row has {self._chunk_bytes:,} bytes or more"
                            record["reason"] = {"code": "row_too_long", "message": message}
                        row += 1
                        pause = _FIRST_PAUSE
                        until = time.monotonic() + self._patience
                        yield record
            except (httpx.TransportError, json.JSONDecodeError) as error:
                # A truncated line is not valid JSON: the connection was lost within it.
                if time.monotonic() >= until:
                    raise self._unreachable(error) from error
            if row < end:
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
                if time.monotonic() >= until:
                    raise self._unreachable(None)

    def _json(
        self, method: str, path: str, body: dict[str, Any] | None = None, content: bytes | None = None
    ) -> dict[str, Any]:
        """The JSON response to an idempotent request, with retries."""
        try:
            response = send(
                self._http, method, path, seconds=self._patience, pause=_FIRST_PAUSE, json=body, content=content
            )
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        if not response.is_success:
            raise _refusal(response)
        answer: dict[str, Any] = response.json()
        return answer

    def _unreachable(self, error: Exception | None) -> ScreeningError:
        return ScreeningError(f"{self._http.base_url} did not answer for {self._patience:g} s: {error}")


def answered_lines(url: str, chunks: Iterable[bytes], seconds: float = 120.0) -> Iterator[bytes]:
    """The lines of the answer to a POST of `chunks`, while these are still being sent; httpx reads none before.

    Raises ScreeningError for an answer other than 200, with its body, and OSError for a lost connection.
    """
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.netloc, timeout=seconds)

    def sender() -> None:
        # Where the answer ends first, the service has said why.
        with suppress(OSError):
            for chunk in filter(None, chunks):
                connection.send(b"%x\r\n%b\r\n" % (len(chunk), chunk))
            connection.send(b"0\r\n\r\n")

    connection.putrequest("POST", parts._replace(scheme="", netloc="", fragment="").geturl())
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    sending = threading.Thread(target=sender, daemon=True)
    sending.start()
    try:
        with http.client.HTTPResponse(connection.sock, method="POST") as answer:
            answer.begin()
            if answer.status != 200:
                raise ScreeningError(f"HTTP {answer.status}: {answer.read(2000).decode('utf-8', 'replace')}")
            yield from answer
    finally:
        connection.close()
        sending.join(seconds)


def _refusal(response: httpx.Response) -> ScreeningError:
    message = error_message(response, response.text[:200])
    return ScreeningError(f"{response.request.url} answered {response.status_code}: {message}")
