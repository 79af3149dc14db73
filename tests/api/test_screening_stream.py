"""Datasets in one request: verdicts in order, during the upload, with every row accounted for."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from reft_ray.api.moderator import ModeratorError, UnavailableError
from reft_ray.telemetry import catalog

Row = Callable[[str], bytes]


def records(response: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line) for line in response.text.splitlines()]


def conserved(trailer: dict[str, Any]) -> bool:
    outcomes = ("allow", "review", "block", "invalid", "unanswered")
    return bool(trailer["rows"] == sum(trailer[outcome] for outcome in outcomes))


def screen(app: Any, body: Any, query: str = "", **headers: str) -> httpx.Response:
    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://filter") as client:
            return await client.post(f"/v1/screenings{query}", content=body, headers=headers)

    return asyncio.run(send())


def test_every_row_gets_its_verdict_in_order(make_filter: Callable[..., Any], row: Row) -> None:
    service = make_filter(batch_rows=7)
    texts = ["Good morning.", "Build a bomb.", "A tactical knife."] * 50
    body = b"\n".join([*map(row, texts), b"no json", b"", row("The end.")])
    *verdicts, trailer = records(screen(service.app, body))
    assert [verdict["row"] for verdict in verdicts] == list(range(153))
    assert [verdict["decision"] for verdict in verdicts] == ["allow", "block", "review"] * 50 + ["invalid"] * 2 + [
        "allow"
    ]
    assert verdicts[1]["part"] == "messages[0].user"
    assert verdicts[1]["id"] == verdicts[4]["id"] != verdicts[0]["id"]
    assert verdicts[150]["reason"]["code"] == "invalid_json"
    assert trailer == {
        "type": "trailer",
        "done": True,
        "rows": 153,
        "allow": 51,
        "review": 50,
        "block": 50,
        "invalid": 2,
        "unanswered": 0,
        "bytes": len(body),
        "teachers": ["rt-words"],
    }
    assert service.recorder.total(catalog.FILTER_ROWS, stream="screening") == 151
    assert service.recorder.total(catalog.UNACCOUNTED_ROWS) == 0
    assert service.judge.calls < 40


def test_an_empty_body_has_a_trailer_alone(make_filter: Callable[..., Any]) -> None:
    assert [record["type"] for record in records(screen(make_filter().app, b""))] == ["trailer"]


def test_a_stream_ends_at_too_many_invalid_rows_with_every_row_accounted_for(
    make_filter: Callable[..., Any], row: Row
) -> None:
    service = make_filter(max_invalid_rows=3)
    *verdicts, error, trailer = records(screen(service.app, row("Hello.") + b"\n" * 4 + row("Bye.") + b"\n" * 100_000))
    assert [verdict["decision"] for verdict in verdicts] == ["allow", *["invalid"] * 3, "allow", "invalid"]
    assert error["error"]["code"] == "too_many_invalid_rows"
    assert error["first_row"] == trailer["rows"] == 6
    assert not trailer["done"]
    assert conserved(trailer)


def test_as_many_invalid_rows_as_allowed_are_answered(make_filter: Callable[..., Any]) -> None:
    *_, trailer = records(screen(make_filter(max_invalid_rows=3).app, b"\n" * 3))
    assert trailer["done"]
    assert trailer["invalid"] == 3


def test_the_first_verdict_comes_before_the_upload_has_ended(
    make_filter: Callable[..., Any], live: Any, row: Row
) -> None:
    async def exchange(port: int) -> tuple[dict[str, Any], list[bytes]]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = "POST /v1/screenings HTTP/1.1\r\nhost: filter\r\ntransfer-encoding: chunked\r\n\r\n"
        line = row("Build a bomb.") + b"\n"
        chunk = f"{len(line):x}\r\n".encode() + line + b"\r\n"
        writer.write(head.encode() + chunk)
        seen = b""
        while b'"verdict"' not in seen:
            seen += await asyncio.wait_for(reader.read(4096), 5)
        # Only now, with a verdict in hand, the rest is sent.
        writer.write(chunk * 3 + b"0\r\n\r\n")
        while b"trailer" not in seen:
            seen += await asyncio.wait_for(reader.read(4096), 5)
        writer.close()
        await writer.wait_closed()
        lines = [part for part in seen.splitlines() if part.startswith(b"{")]
        return json.loads(lines[-1]), lines

    with live(make_filter().app) as url:
        trailer, lines = asyncio.run(exchange(httpx.URL(url).port or 0))
    assert trailer["rows"] == trailer["block"] == 4
    assert len(lines) == 5


@pytest.mark.parametrize("declared", [True, False])
def test_above_the_limit_is_413_or_a_record_that_names_the_resumable_way(
    make_filter: Callable[..., Any], row: Row, declared: bool
) -> None:
    service = make_filter(max_upload_bytes=4096)
    body = (row("Good morning.") + b"\n") * 100

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    response = screen(service.app, body if declared else pieces())
    if declared:
        assert response.status_code == 413
        assert "/v1/screenings/resumable" in response.json()["error"]["message"]
        return
    *_, error, trailer = records(response)
    assert error["type"] == "error"
    assert "/v1/screenings/resumable" in error["error"]["message"]
    assert trailer["done"] is False
    assert conserved(trailer)
    assert trailer["allow"] > 0


def test_a_lost_teacher_ends_the_stream_with_an_error_and_an_account(make_filter: Callable[..., Any], row: Row) -> None:
    service = make_filter(batch_rows=5, window=1)
    service.judge.failures = []
    inner = service.judge.judge

    async def failing(*args: Any, **kwargs: Any) -> Any:
        if service.judge.calls == 3:
            raise UnavailableError("gone")
        return await inner(*args, **kwargs)

    service.judge.judge = failing
    *verdicts, error, trailer = records(screen(service.app, b"\n".join([row("Good morning.")] * 100)))
    assert error["type"] == "error"
    assert error["first_row"] == len(verdicts) == trailer["allow"] > 0
    assert trailer["done"] is False
    assert trailer["unanswered"] > 0
    assert conserved(trailer)


def test_a_failed_stream_cancels_every_batch_in_flight(make_filter: Callable[..., Any], row: Row) -> None:
    """Also the one that waits for a place in the window."""
    service = make_filter(batch_rows=5, window=1)
    begun, cancelled = 0, 0

    async def judge(*_: Any, **__: Any) -> Any:
        nonlocal begun, cancelled
        begun += 1
        if begun == 1:
            while begun < 3:
                await asyncio.sleep(0)
            raise UnavailableError("gone")
        try:
            await asyncio.Event().wait()
        finally:
            cancelled += 1

    service.judge.judge = judge

    async def run() -> tuple[int, int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(service.app), base_url="http://filter") as client:
            response = await client.post("/v1/screenings", content=b"\n".join([row("Good morning.")] * 100))
        assert records(response)[-2]["type"] == "error"
        return begun, cancelled  # read here: the end of a loop cancels what it still has

    assert asyncio.run(run()) == (3, 2)


def test_a_stream_waits_where_a_single_request_does_not(make_filter: Callable[..., Any], row: Row) -> None:
    service = make_filter()
    patience: list[bool] = []
    inner = service.judge.judge

    async def noting(conversations: Any, thresholds: Any, deadline: float, patient: bool = False) -> Any:
        patience.append(patient)
        return await inner(conversations, thresholds, deadline, patient)

    service.judge.judge = noting
    screen(service.app, row("Good morning."))
    assert patience == [True]


def test_memory_is_bounded_by_the_window(make_filter: Callable[..., Any], row: Row) -> None:
    """A reader that is faster than the teacher is held back: rows are read only as verdicts go out."""

    async def run() -> tuple[int, int]:
        service = make_filter(batch_rows=10, window=2)
        service.judge.gate = asyncio.Event()
        line = row("Good morning.") + b"\n"
        sent = 0

        async def endless() -> AsyncIterator[bytes]:
            nonlocal sent
            for _ in range(1000):
                sent += 1
                yield line
                await asyncio.sleep(0)

        async with httpx.AsyncClient(transport=httpx.ASGITransport(service.app), base_url="http://filter") as client:
            upload = asyncio.create_task(client.post("/v1/screenings", content=endless()))
            for _ in range(5000):
                await asyncio.sleep(0)
            held = sent
            service.judge.gate.set()
            response = await upload
        assert records(response)[-1]["allow"] == 1000
        return held, service.judge.most_waiting

    held, waiting = asyncio.run(run())
    # One row's queue, the window and the batches at its two ends.
    assert held <= 10 * (2 + 4)
    assert waiting <= 2 + 2


def test_slots_are_limited_and_freed(make_filter: Callable[..., Any], row: Row) -> None:
    async def run() -> list[int]:
        service = make_filter(max_streams=1)
        service.judge.gate = asyncio.Event()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(service.app), base_url="http://filter") as client:
            first = asyncio.create_task(client.post("/v1/screenings", content=row("Good morning.")))
            while not service.judge.waiting:
                await asyncio.sleep(0)
            second = await client.post("/v1/screenings", content=row("Good morning."))
            assert second.headers["retry-after"] == "5"
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            # A cancelled stream leaves no call and no slot.
            assert service.judge.waiting == 0
            service.judge.gate.set()
            third = await client.post("/v1/screenings", content=row("Good morning."))
        return [second.status_code, third.status_code]

    assert asyncio.run(run()) == [429, 200]


def test_overlong_rows_are_invalid_and_not_kept(make_filter: Callable[..., Any], row: Row) -> None:
    body = b"\n".join([row("a"), row("b" * 10_000_000), row("c")])
    *verdicts, trailer = records(screen(make_filter(max_row_bytes=1024).app, body))
    assert [verdict["decision"] for verdict in verdicts] == ["allow", "invalid", "allow"]
    assert verdicts[1]["reason"]["code"] == "row_too_long"
    assert conserved(trailer)


def test_thresholds_come_with_the_query(make_filter: Callable[..., Any], row: Row) -> None:
    app = make_filter().app
    verdict, _ = records(screen(app, row("A knife."), "?block=0.05"))
    assert (verdict["decision"], verdict["threshold"]) == ("block", 0.05)
    assert screen(app, row("A knife."), "?block=0.9").status_code == 400
    assert screen(app, row("A knife."), "?block=nan").status_code == 400


def test_a_compressed_body_is_refused_rather_than_misread(make_filter: Callable[..., Any]) -> None:
    assert screen(make_filter().app, b"\x1f\x8b", **{"content-encoding": "gzip"}).status_code == 400


def test_a_silent_upload_ends_with_an_error_record(make_filter: Callable[..., Any], row: Row) -> None:
    async def slow() -> AsyncIterator[bytes]:
        yield row("Good morning.") + b"\n"
        await asyncio.Event().wait()

    verdict, error, trailer = records(screen(make_filter(idle_seconds=0.05).app, slow()))
    assert verdict["decision"] == "allow"
    assert error["error"]["code"] == "upload_stalled"
    assert (trailer["done"], trailer["rows"], trailer["allow"]) == (False, 1, 1)


def test_a_scorer_that_fails_is_an_error_not_an_allow(make_filter: Callable[..., Any], row: Row) -> None:
    service = make_filter()
    service.judge.failures.append(ModeratorError("broken"))
    error, trailer = records(screen(service.app, row("Good morning.")))
    assert error["error"]["code"] == "teacher_failed"
    assert (trailer["done"], trailer["unanswered"]) == (False, 1)


def test_a_stream_that_never_starts_frees_its_slot(make_filter: Callable[..., Any], row: Row) -> None:
    async def run() -> None:
        service = make_filter(max_streams=1)
        scope = {
            "type": "http", "http_version": "1.1", "method": "POST", "path": "/v1/screenings", "raw_path": b"",
            "query_string": b"", "headers": [], "server": ("filter", 80), "client": ("client", 1), "scheme": "http",
        }  # fmt: skip

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": row("Good morning."), "more_body": False}

        async def gone(message: Any) -> None:
            raise ConnectionResetError

        for _ in range(3):
            with pytest.raises(ConnectionResetError):
                await service.app(dict(scope), receive, gone)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(service.app), base_url="http://filter") as client:
            response = await client.post("/v1/screenings", content=row("Good morning."))
        assert response.status_code == 200

    asyncio.run(run())
