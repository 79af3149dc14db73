"""Thousands of hostile bodies: no 500, no hang, no leak, and every row accounted for."""

import asyncio
import gc
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import psutil
import pytest

VALUES: list[Any] = [
    None, True, 0, -1, 1e308, 10**4000, float("nan"), float("inf"), "", " ", "a", "\x00", "\ud800", "bomb", "a" * 5000,
    [], {}, [[]], [None], ["a", 1], {"type": "text"}, {"type": "text", "text": "x"}, {"type": "image_url"},
]  # fmt: skip


def nested(source: random.Random, depth: int = 0) -> Any:
    if depth > 4 or source.random() < 0.5:
        return source.choice(VALUES)
    if source.random() < 0.5:
        return [nested(source, depth + 1) for _ in range(source.randrange(4))]
    keys = ("input", "model", "reft", "messages", "role", "content", "text", "prompt", "completion", "weight")
    return {source.choice(keys): nested(source, depth + 1) for _ in range(source.randrange(5))}


def mutated(source: random.Random, body: bytes) -> bytes:
    data = bytearray(body)
    for _ in range(source.randrange(1, 6)):
        at = source.randrange(len(data) + 1)
        match source.randrange(4):
            case 0:
                data[at:at] = source.randbytes(source.randrange(1, 5))
            case 1:
                del data[at : at + source.randrange(1, 9)]
            case 2:
                data[at:at] = b"\n"
            case 3:
                data = data[:at] or bytearray(b"{")
    return bytes(data)


def moderation_body(source: random.Random) -> bytes:
    value = nested(source) if source.random() < 0.3 else {"input": nested(source), "model": nested(source)}
    if isinstance(value, dict) and source.random() < 0.5:
        value.pop("model", None)
    body = dumps(value)
    return mutated(source, body) if source.random() < 0.3 else body


def rows_body(source: random.Random) -> bytes:
    lines = []
    for _ in range(source.randrange(6)):
        turn = {"role": source.choice(["user", "assistant", "king", 3, None]), "content": nested(source)}
        lines.append(dumps(source.choice([{"messages": [turn]}, {"text": nested(source)}, nested(source)])))
    body = b"\n".join(lines)
    return mutated(source, body) if source.random() < 0.5 else body


def dumps(value: Any) -> bytes:
    """JSON; Python writes no integer of thousands of digits, so that one is written by hand."""
    text = '{"input": 1' + "0" * 5000 + "}" if _huge(value) else json.dumps(value)
    return text.encode()


def _huge(value: Any) -> bool:
    match value:
        case list():
            return any(map(_huge, value))
        case dict():
            return any(map(_huge, value.values()))
    return isinstance(value, int) and value.bit_length() > 10_000


def lines_in(body: bytes) -> int:
    return body.count(b"\n") + (not body.endswith(b"\n") and bool(body))


@pytest.mark.parametrize("bodies", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_hostile_bodies(make_filter: Callable[..., Any], bodies: int) -> None:
    service = make_filter(max_body_bytes=100_000, max_row_bytes=4096, idle_seconds=5)
    source = random.Random(20261123)
    statuses: Counter[int] = Counter()

    async def moderate(client: httpx.AsyncClient) -> None:
        response = await client.post(
            "/moderations", content=moderation_body(source), headers={"content-type": "application/json"}
        )
        statuses[response.status_code] += 1
        assert response.status_code in (200, 400, 404, 413), response.text
        assert response.headers["x-request-id"]
        assert ("results" in response.json()) == (response.status_code == 200)

    async def screen(client: httpx.AsyncClient) -> None:
        body = rows_body(source)
        size = source.randrange(1, 200)

        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(body), size):
                yield body[start : start + size]

        response = await client.post("/screenings", content=pieces())
        statuses[response.status_code] += 1
        assert response.status_code == 200
        *verdicts, trailer = [json.loads(line) for line in response.text.splitlines()]
        assert trailer["done"] is True
        assert len(verdicts) == trailer["rows"] == lines_in(body)
        assert [verdict["row"] for verdict in verdicts] == list(range(len(verdicts)))

    def held() -> tuple[int, int]:
        gc.collect()
        return len(gc.get_objects()), psutil.Process().memory_info().rss

    async def run() -> tuple[tuple[int, int], tuple[int, int]]:
        transport = httpx.ASGITransport(service.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://filter/v1") as client:
            for number in range(200):
                await (moderate if number % 2 else screen)(client)
            tasks, before = len(asyncio.all_tasks()), held()
            for number in range(bodies - 200):
                await asyncio.wait_for((moderate if number % 4 else screen)(client), 10)
            assert len(asyncio.all_tasks()) == tasks
            return before, held()

    (objects_before, bytes_before), (objects_after, bytes_after) = asyncio.run(run())
    assert sum(statuses.values()) == bodies
    assert statuses[200] > bodies / 5
    assert statuses[400] > bodies / 5
    # The recorder keeps its observations; anything that grew per request otherwise would show.
    assert objects_after < objects_before + 3 * bodies
    assert bytes_after < bytes_before + (16 << 20) + 1024 * bodies
    assert service.judge.waiting == 0


def test_a_client_that_disconnects_leaves_nothing(make_filter: Callable[..., Any], live: Any) -> None:
    service = make_filter(idle_seconds=30)
    line = b'{"text": "Good morning."}\n'

    async def vanish(port: int, body: bytes) -> bool:
        """Whether the stream was under way when its client left; the place of an earlier one may not be free yet."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(b"POST /v1/screenings HTTP/1.1\r\nhost: filter\r\ncontent-length: 100000\r\n\r\n" + body)
            if body:
                status = await asyncio.wait_for(reader.readuntil(b"\r\n"), 60)
                if b" 429 " in status:
                    return False
                await asyncio.wait_for(reader.readuntil(b'"verdict"'), 60)
            return True
        finally:
            # An open socket would fail the test that runs when it is collected.
            writer.close()
            await writer.wait_closed()

    async def insist(port: int, body: bytes) -> None:
        until = time.monotonic() + 60
        while not await vanish(port, body):
            assert time.monotonic() < until, "a place was never freed"

    async def run(port: int) -> None:
        for _ in range(3):
            await asyncio.gather(*(insist(port, line * number) for number in range(8)))

    with live(service.app) as url, httpx.Client(base_url=url) as client:
        asyncio.run(run(httpx.URL(url).port or 0))
        # All slots are freed, although 24 streams used 8 of them and none finished.
        trailers: list[str] = []
        until = time.monotonic() + 60
        while len(trailers) < 8:
            assert time.monotonic() < until, "a place was never freed"
            response = client.post("/v1/screenings", content=line)
            if response.status_code != 429:
                trailers.append(response.text.splitlines()[-1])
    assert all('"done":true' in trailer for trailer in trailers)


def test_many_slow_clients_are_served_concurrently(make_filter: Callable[..., Any], live: Any) -> None:
    async def slow(port: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = b'{"text": "Good morning."}\n' * 3
        writer.write(f"POST /v1/screenings HTTP/1.1\r\nhost: filter\r\ncontent-length: {len(body)}\r\n\r\n".encode())
        for start in range(0, len(body), 5):
            writer.write(body[start : start + 5])
            await writer.drain()
            await asyncio.sleep(0.005)
        answer = await asyncio.wait_for(reader.readuntil(b'"teachers":["rt-words"]}'), 10)
        writer.close()
        await writer.wait_closed()
        return answer

    async def run(port: int) -> list[bytes]:
        return await asyncio.gather(*(slow(port) for _ in range(8)))

    with live(make_filter().app) as url:
        answers = asyncio.run(run(httpx.URL(url).port or 0))
    assert all(answer.count(b'"decision":"allow"') == 3 for answer in answers)
