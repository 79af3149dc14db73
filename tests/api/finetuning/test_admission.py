"""Who asks and whether there is room are settled before a byte of a body is read, on every route."""

import asyncio
import re
import threading

import pytest
from sqlalchemy.exc import OperationalError

from reft_ray.api.shares import Shares
from reft_ray.core.completion import Piece

JSON = {"content-type": "application/json"}


def routes(app):
    found = []
    for path, operations in app.openapi()["paths"].items():
        found += [(method.upper(), re.sub(r"\{\w+\}", "0", path)) for method in operations]
    return [(method, path) for method, path in found if path.startswith("/v1/")]


def test_no_route_reads_a_byte_of_a_body_without_a_key(running):
    service = running()
    every = routes(service.app)
    assert len(every) > 30

    async def ask():
        for method, path in [*every, ("POST", "/v1/unknown")]:
            for headers in ({}, {"authorization": "Bearer sk-reft-wrong"}):
                status, _, asked = await service.call(method, path, {"content-length": str(10**9), **JSON, **headers})
                assert (status, asked) == (401, 0), (method, path)

    asyncio.run(ask())


def test_no_route_reads_a_body_that_is_declared_too_large_or_that_the_key_may_not_send(running):
    service = running()
    secret = service.stores.tenants.create_key("acme", "one", "reader", ["files.read"])[1]
    key = service.key(requests_per_minute=10**6) | JSON | {"content-length": str(1 << 40)}

    async def ask():
        for method, path in routes(service.app):
            if method == "GET":
                continue
            status, _, asked = await service.call(method, path, {"authorization": f"Bearer {secret}", **JSON})
            assert (status, asked) == (403, 0), (method, path)
            status, _, asked = await service.call(method, path, key)
            assert asked == 0, (method, path)
            assert status in (413, 403), (method, path)  # 403 where an owner's key may not write

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[" + b"[]," * 60_000 + b"[]]", "JSON values"),
        (b"[" + b"1," * 60_000 + b"1]", "JSON values"),
        (b"[" + b'"",' * 60_000 + b'""]', "JSON values"),
        (b"[" + b"{}," * 60_000 + b"{}]", "JSON values"),
        (b'{"bytes":' * 5000, "nested"),
        (b"[" * 5000, "nested"),
    ],
)
def test_json_is_bounded_before_it_is_parsed(running, body, message):
    service = running()
    headers = service.key() | JSON
    pieces = [body[start : start + 65536] for start in range(0, len(body), 65536)]

    async def ask():
        async with service.client(headers=headers) as client:
            return await client.post("/v1/uploads", content=iterate(pieces))

    answer = asyncio.run(ask())
    assert (answer.status_code, message in answer.text) == (400, True), answer.text


async def iterate(pieces):
    for piece in pieces:
        yield piece


def test_a_text_of_commas_and_braces_is_one_value(running):
    service = running()

    async def ask():
        async with service.client(headers=service.key()) as client:
            return (await client.post("/v1/moderations", json={"input": '{[,"\\' * 100_000})).status_code

    assert asyncio.run(ask()) == 200


@pytest.mark.parametrize("path", ["/v1/uploads", "/v1/files", "/v1/screenings", "/v1/screenings/screen-x/chunks/0"])
def test_a_silent_client_is_not_waited_for(running, path):
    service = running(idle_seconds=0.05)
    method = "PUT" if "chunks" in path else "POST"
    form = "files" in path
    headers = service.key() | {"content-type": "multipart/form-data; boundary=x" if form else "application/json"}
    start = b"--x\r\n" if form else b"{"
    status, text, _ = asyncio.run(asyncio.wait_for(service.call(method, path, headers, [start]), 20))
    assert "too slowly" in text
    assert status == 408 or path == "/v1/screenings"  # whose status was sent before


def test_a_client_that_drips_is_not_waited_for(running):
    service = running(idle_seconds=0.2)

    async def ask():
        async def drip():
            while True:
                yield b" "
                await asyncio.sleep(0.02)

        async with service.client(headers=service.key() | JSON) as client:
            return await asyncio.wait_for(client.post("/v1/uploads", content=drip()), 20)

    assert asyncio.run(ask()).status_code == 408


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/screenings/{}/verdicts"])
def test_a_long_answer_is_not_cut_off_by_the_time_limit_of_bodies(running, monkeypatch, path):
    service = running(idle_seconds=0.1)
    key = service.key()

    class Slow:
        async def generate(self, target, conversation, sampling):
            for _ in range(5):
                await asyncio.sleep(0.1)
                yield Piece("word ")
            yield Piece("", finish_reason="stop")

    monkeypatch.setattr("reft_ray.api.chat_model.EchoChat.generate", Slow.generate)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stream": True}

    async def ask():
        async with service.client(headers=key) as client:
            if "chat" in path:
                return (await client.post(path, json=body)).text
            made = (await client.post("/v1/screenings/resumable", json={})).json()["id"]
            return (await client.get(path.format(made), params={"wait_seconds": 0.5})).text

    assert ("[DONE]" if "chat" in path else "trailer") in asyncio.run(ask())


def test_compressed_bodies_are_refused_everywhere(running):
    service = running()

    key = service.key(requests_per_minute=10**6) | JSON | {"content-encoding": "gzip"}

    async def ask():
        for method, path in routes(service.app):
            status, text, asked = await service.call(method, path, key)
            assert asked == 0, (method, path)
            assert status == 403 or "Compressed" in text, (method, path)

    asyncio.run(ask())


async def asked_from(service, method, path, headers):
    async with service.client() as client:
        return (await client.request(method, path, headers=headers)).status_code


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 403),
        ({"host": "localhost.evil.example"}, 403),
        ({"host": "127.0.0.1.nip.io:8000"}, 403),
        ({"host": "evil@127.0.0.1"}, 403),
        ({"host": "0.0.0.0"}, 403),
        ({"host": ""}, 403),
        ({"host": "127.0.0.1:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "LOCALHOST:8000"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://localhost.evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://localhost:3000"}, 200),
        ({"origin": "http://127.0.0.1"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 403),
        ({"sec-fetch-site": "same-origin"}, 200),
    ],
)
def test_a_service_without_keys_answers_no_other_sites_page(running, headers, status):
    service = running(keys=False)
    for method, path in (("GET", "/v1/files"), ("POST", "/v1/fine_tuning/jobs/ftjob-x/cancel")):
        found = asyncio.run(asked_from(service, method, path, headers))
        assert (found == 403) == (status == 403), (method, path, found)
    # With a key the caller is known, wherever it comes from.
    assert asyncio.run(service.call("GET", "/v1/files", service.key() | headers))[0] == 200


def test_the_operator_may_name_hosts(running):
    service = running(keys=False, hosts=("reft.internal",))
    assert asyncio.run(service.call("GET", "/v1/files", {"host": "reft.internal:8000"}))[0] == 200
    assert asyncio.run(service.call("GET", "/v1/files", {"host": "evil.example"}))[0] == 403


def test_a_free_slot_goes_to_the_owner_that_holds_fewest():
    async def run():
        slots, order = Shares(4, 3), []

        async def work(owner):
            async with slots.held(owner):
                order.append(owner)
                await asyncio.sleep(0)

        hostile = [asyncio.create_task(work("a")) for _ in range(50)]
        await asyncio.sleep(0)
        other = asyncio.create_task(work("b"))
        cancelled = asyncio.create_task(work("c"))
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.gather(*hostile, other, cancelled, return_exceptions=True)
        return order, slots

    order, slots = asyncio.run(run())
    assert order.index("b") < 5
    assert len(order) >= 51
    assert [slots.take("a") for _ in range(4)] == [True, True, True, False]
    assert [slots.take("b") for _ in range(2)] == [True, False]


def test_slow_calls_of_one_project_leave_threads_to_the_others(running, monkeypatch):
    service = running()
    hostile, other = service.key("hostile", requests_per_minute=10**6), service.key("other")
    held, most, at_work = threading.Event(), 0, 0
    listed = service.stores.webhooks.list

    def slow(project_id):
        nonlocal most, at_work
        at_work += 1
        most = max(most, at_work)
        held.wait(30)
        at_work -= 1
        return listed(project_id)

    monkeypatch.setattr(service.stores.webhooks, "list", slow)

    async def ask():
        async with service.client() as client:
            calls = [asyncio.create_task(client.get("/v1/webhook_endpoints", headers=hostile)) for _ in range(100)]
            while at_work < 8:
                await asyncio.sleep(0.01)
            answer = await asyncio.wait_for(client.get("/v1/models", headers=other), 20)
            held.set()
            return answer, await asyncio.gather(*calls)

    answer, calls = asyncio.run(ask())
    assert answer.status_code == 200
    assert {call.status_code for call in calls} == {200}
    assert most == 8


def test_requests_at_work_are_bounded_per_project(running):
    service = running(max_requests_at_once=2)
    hostile, other = service.key("hostile", requests_per_minute=10**6), service.key("other")

    at_work = 0

    def started():
        nonlocal at_work
        at_work += 1
        yield b"{"

    async def ask():
        bodies = [service.call("POST", "/v1/uploads", hostile | JSON, started()) for _ in range(2)]
        silent = [asyncio.create_task(body) for body in bodies]
        async with service.client() as client, asyncio.timeout(30):
            while at_work < 2:
                await asyncio.sleep(0.01)
            refused = await client.get("/v1/models", headers=hostile)
            answered = await client.get("/v1/models", headers=other)
        for task in silent:
            task.cancel()
        await asyncio.gather(*silent, return_exceptions=True)
        return refused, answered

    refused, answered = asyncio.run(ask())
    assert (refused.status_code, answered.status_code) == (429, 200)
    assert refused.headers["retry-after"] == "1"


def test_one_project_holds_a_share_of_the_streams(running):
    service = running()
    hostile, other = service.key("hostile"), service.key("other")

    async def ask():
        line = b'{"text": "Good morning."}\n'
        streams = [asyncio.create_task(service.call("POST", "/v1/screenings", hostile, [line])) for _ in range(8)]
        async with service.client() as client, asyncio.timeout(30):
            while len(done := [task for task in streams if task.done()]) < 4:
                await asyncio.wait(set(streams) - set(done), return_when=asyncio.FIRST_COMPLETED)
            answer = await client.post("/v1/screenings", headers=other, content=line)
        held = sum(not task.done() for task in streams)
        for task in streams:
            task.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
        return [task.result()[0] for task in done], held, answer

    refused, held, answer = asyncio.run(ask())
    assert (refused, held) == ([429] * 4, 4)
    assert '"done":true' in answer.text


def test_a_database_that_is_gone_is_503_and_not_ready(running, tmp_path):
    service = running()
    key = service.key()

    async def ask(path):
        async with service.client(headers=key) as client:
            return await client.get(path)

    assert asyncio.run(ask("/readyz")).status_code == 200
    service.stores.database.close()
    (tmp_path / "jobs.db").rename(tmp_path / "elsewhere.db")
    (tmp_path / "jobs.db").mkdir()
    for path in ("/readyz", "/v1/models", "/v1/files"):
        answer = asyncio.run(ask(path))
        assert (answer.status_code, int(answer.headers["retry-after"]) > 0) == (503, True), path
    assert asyncio.run(ask("/healthz")).status_code == 200


def test_reading_goes_on_where_nothing_can_be_written(running, monkeypatch):
    service = running()
    key = service.key()

    def locked(*args):
        raise OperationalError("UPDATE", {}, Exception("database is locked"))

    async def ask():
        async with service.client(headers=key) as client:
            read = await client.get("/v1/models")
            return read.status_code, (await client.delete("/v1/files/file-x")).status_code

    assert asyncio.run(ask()) == (200, 404)
    monkeypatch.setattr(service.stores.rate_limits, "take", locked)
    assert asyncio.run(ask()) == (200, 503)
