"""Transient errors are retried, within the limits of attempts and time; others are returned at once."""

from collections.abc import Callable

import httpx
import pytest

from reft_ray.api.http_retry import error_message, is_transient, send


def scripted(*replies: httpx.Response | Exception) -> tuple[httpx.Client, list[httpx.Request]]:
    """A client whose server gives these replies in order, and the requests that it has received."""
    left, received = list(replies), []

    def answer(request: httpx.Request) -> httpx.Response:
        received.append(request)
        reply = left.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply

    return httpx.Client(transport=httpx.MockTransport(answer), base_url="http://server"), received


def test_lost_connections_and_transient_statuses_are_retried() -> None:
    client, received = scripted(httpx.ReadError("lost"), httpx.Response(503), httpx.Response(200))
    assert send(client, "POST", "/x", attempts=3, pause=0, json={"a": 1}).status_code == 200
    assert [request.content for request in received] == [b'{"a":1}'] * 3


@pytest.mark.parametrize("limit", [{"attempts": 2}, {"seconds": -1.0}])
def test_the_last_failure_is_the_callers(limit: dict[str, float]) -> None:
    allowed = int(limit.get("attempts", 1))
    client, received = scripted(*[httpx.Response(500)] * 3)
    assert send(client, "GET", "/x", pause=0, **limit).status_code == 500
    assert len(received) == allowed
    client, received = scripted(*[httpx.ConnectError("refused")] * 3)
    with pytest.raises(httpx.ConnectError):
        send(client, "GET", "/x", pause=0, **limit)
    assert len(received) == allowed


@pytest.mark.parametrize(
    ("status", "headers", "retried"),
    [(200, {}, False), (400, {}, False), (409, {}, True), (429, {}, True), (409, {"x-should-retry": "false"}, False)],
)
def test_the_server_decides_what_is_retried(status: int, headers: dict[str, str], retried: bool) -> None:
    assert is_transient(httpx.Response(status, headers=headers)) is retried


def test_pauses_double_and_respect_retry_after(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    sleep: Callable[[float], None] = pauses.append
    monkeypatch.setattr("time.sleep", sleep)
    busy = httpx.Response(429, headers={"retry-after": "7"})
    endless = httpx.Response(429, headers={"retry-after": "3600"})
    client, _ = scripted(httpx.Response(500), httpx.Response(500), busy, endless, httpx.Response(200))
    send(client, "GET", "/x", pause=0.5)
    assert pauses == [0.5, 1.0, 7.0, 10.0]


def test_the_message_is_that_of_the_envelope() -> None:
    assert error_message(httpx.Response(400, json={"error": {"message": "no"}}), "other") == "no"
    for body in (b"<html>", b"[]", b'{"error": "no"}'):
        assert error_message(httpx.Response(502, content=body), "other") == "other"
