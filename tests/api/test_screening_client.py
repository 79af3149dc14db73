"""The client gets a verdict for every row, in spite of network errors."""

import json
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from reft_ray.api.client import ScreeningClient, ScreeningError

Row = Callable[[str], bytes]


class Flaky(httpx.BaseTransport):
    """A network that loses answers and cuts streams, on a fixed schedule."""

    def __init__(self, every: int) -> None:
        self._inner = httpx.HTTPTransport()
        self._every = every
        self.requests = 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.requests += 1
        response = self._inner.handle_request(request)
        if self.requests % self._every:
            return response
        body = response.read()
        response.close()
        if request.method == "GET" and len(body) > 60:
            return httpx.Response(response.status_code, stream=Cut(body[: len(body) // 2]))
        # The service has done the work; its response is lost.
        raise httpx.ReadError("lost", request=request)

    def close(self) -> None:
        self._inner.close()


class Cut(httpx.SyncByteStream):
    def __init__(self, body: bytes) -> None:
        self._body = body

    def __iter__(self) -> Iterator[bytes]:
        yield self._body
        raise httpx.ReadError("cut")


def rows(row: Row, number: int) -> Iterator[bytes]:
    texts = ("Good morning", "Build a bomb", "A tactical knife")
    return (row(f"{texts[index % 3]} {index}") + b"\n" for index in range(number))


def test_verdicts_on_all_rows_in_order(make_filter: Callable[..., Any], live: Any, row: Row) -> None:
    seen: list[tuple[int, int]] = []
    with live(make_filter().app) as url, ScreeningClient(url + "/v1/", chunk_bytes=2000) as client:
        found = list(client.screen(rows(row, 500), lambda done, sent: seen.append((done, sent))))
        assert client.teacher()["id"] == "rt-words"
    assert [verdict["row"] for verdict in found] == list(range(500))
    assert [verdict["decision"] for verdict in found] == (["allow", "block", "review"] * 167)[:500]
    assert seen == sorted(seen)
    assert seen[-1] == (500, sum(len(line) for line in rows(row, 500)))
    assert len(seen) > 10


def test_a_bad_network_changes_nothing(make_filter: Callable[..., Any], live: Any, row: Row) -> None:
    service = make_filter()
    with live(service.app) as url:
        flaky = Flaky(every=4)
        with ScreeningClient(url, chunk_bytes=1500, transport=flaky) as client:
            found = list(client.screen(rows(row, 400)))
    assert [verdict["row"] for verdict in found] == list(range(400))
    assert flaky.requests > 30


def test_rows_that_are_too_large_keep_their_place(make_filter: Callable[..., Any], live: Any, row: Row) -> None:
    with live(make_filter().app) as url, ScreeningClient(url, chunk_bytes=1000) as client:
        found = list(client.screen([row("a"), row("b" * 5000), b"", row("c")]))
    assert [verdict["decision"] for verdict in found] == ["allow", "invalid", "invalid", "allow"]
    assert [verdict["reason"]["code"] for verdict in found[1:3]] == ["row_too_long", "empty_line"]


def test_no_rows_no_verdicts(make_filter: Callable[..., Any], live: Any) -> None:
    with live(make_filter().app) as url, ScreeningClient(url) as client:
        assert list(client.screen([])) == []


def test_a_refusal_is_one_clear_line(make_filter: Callable[..., Any], live: Any, row: Row) -> None:
    with live(make_filter().app) as url, ScreeningClient(url) as client:
        with pytest.raises(ScreeningError, match=r"400.*operator's bounds"):
            list(client.screen([row("a")], block=0.9))
        with pytest.raises(ScreeningError, match="line break"):
            list(client.screen([b"a\nb"]))


def test_an_unreachable_service_is_an_error_within_the_patience() -> None:
    with ScreeningClient("http://127.0.0.1:9", patience=0.2) as client, pytest.raises(ScreeningError, match="answer"):
        client.teacher()


def test_missing_verdicts_are_an_error(row: Row) -> None:
    """A service that loses a row is detected."""

    def answer(request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if path.endswith("/chunks/0"):
            return httpx.Response(200, json={"rows": 1})
        if path.endswith("/verdicts"):
            return httpx.Response(200, text=json.dumps({"type": "verdict", "row": 0, "decision": "allow"}) + "\n")
        return httpx.Response(200, json={"id": "screen-1", "rows": 1, "next_chunk": 1})

    transport = httpx.MockTransport(answer)
    with ScreeningClient("http://filter", transport=transport) as client, pytest.raises(ScreeningError, match="2 rows"):
        list(client.screen([row("a"), row("b")]))


@pytest.mark.usefixtures("usual_collection")
def test_memory_does_not_grow_with_the_dataset(make_filter: Callable[..., Any], live: Any, row: Row) -> None:
    def peak(number: int) -> int:
        tracemalloc.start()
        try:
            with ScreeningClient(url, chunk_bytes=5000) as client:
                assert sum(1 for _ in client.screen(rows(row, number))) == number
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    with live(make_filter().app) as url:
        peak(150)
        # 1.2 times as much; were the verdicts kept, 3 times.
        assert peak(2400) < 1.5 * peak(600)
