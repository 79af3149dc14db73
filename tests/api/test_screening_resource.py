"""Datasets in chunks: numbered, repeatable, readable from any row, closed."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from reft_ray.api.errors import ApiError
from reft_ray.api.filter_app import create_filter_app
from reft_ray.api.moderator import LocalModerator, UnavailableError
from reft_ray.api.screening_store import ScreeningStore
from reft_ray.api.settings import FilterSettings
from reft_ray.core.verdict import Thresholds
from reft_ray.testbed.word_scorer import WordScorer

Row = Callable[[str], bytes]
Body = Callable[[httpx.AsyncClient], Awaitable[None]]
HERE = FilterSettings(hosts=("filter",))


def use(app: Any, body: Body) -> None:
    async def run() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://filter/v1") as client:
            await body(client)

    asyncio.run(run())


async def create(client: httpx.AsyncClient, **body: Any) -> str:
    response = await client.post("/screenings/resumable", json=body)
    assert response.status_code == 200, response.text
    return f"/screenings/{response.json()['id']}"


async def verdicts(client: httpx.AsyncClient, path: str, **parameters: Any) -> list[dict[str, Any]]:
    response = await client.get(f"{path}/verdicts", params=parameters)
    return [json.loads(line) for line in response.text.splitlines()]


def test_a_dataset_in_three_chunks(make_filter: Callable[..., Any], row: Row) -> None:
    async def body(client: httpx.AsyncClient) -> None:
        path = await create(client, metadata={"dataset": "demo"})
        chunk = row("Hello.") + b"\n" + row("A bomb.") + b"\nno json\n"
        for sequence in (1, 0, 2):
            receipt = (await client.put(f"{path}/chunks/{sequence}", content=chunk)).json()
            assert (receipt["sequence"], receipt["rows"], receipt["duplicate"]) == (sequence, 3, False)
            assert receipt["counts"] == {"allow": 1, "review": 0, "block": 1, "invalid": 1}
        state = (await client.get(path)).json()
        assert (state["status"], state["next_chunk"], state["rows"]) == ("open", 3, 9)
        assert state["metadata"] == {"dataset": "demo"}
        assert (await client.post(f"{path}/close", json={"chunks": 3})).json()["status"] == "closed"
        *found, trailer = await verdicts(client, path)
        assert [record["row"] for record in found] == list(range(9))
        assert [record["decision"] for record in found] == ["allow", "block", "invalid"] * 3
        assert trailer == {
            "type": "trailer", "done": True, "cursor": 9, "rows": 9, "allow": 3, "review": 0, "block": 3, "invalid": 3
        }  # fmt: skip
        *rest, _ = await verdicts(client, path, cursor=7)
        assert rest == found[7:]

    use(make_filter().app, body)


def test_a_chunk_may_be_sent_again_but_not_changed(make_filter: Callable[..., Any], row: Row) -> None:
    service = make_filter()

    async def body(client: httpx.AsyncClient) -> None:
        path = await create(client)
        first = await client.put(f"{path}/chunks/0", content=row("Hello."))
        again = await client.put(f"{path}/chunks/0", content=row("Hello."))
        assert again.json() == first.json() | {"duplicate": True}
        assert service.judge.calls == 1
        changed = await client.put(f"{path}/chunks/0", content=row("Hello!"))
        assert (changed.status_code, changed.headers["x-should-retry"]) == (409, "false")

    use(service.app, body)


def test_chunks_far_ahead_of_the_verdicts_are_rejected(make_filter: Callable[..., Any], row: Row) -> None:
    async def body(client: httpx.AsyncClient) -> None:
        path = await create(client)
        early = await client.put(f"{path}/chunks/9", content=row("Hello."))
        assert (early.status_code, early.headers["retry-after"]) == (429, "1")
        assert (await client.put(f"{path}/chunks/8", content=row("Hello."))).status_code == 200

    use(make_filter(window=4).app, body)


def test_chunks_are_rejected_while_others_are_judged(make_filter: Callable[..., Any], row: Row) -> None:
    service = make_filter(max_streams=2)

    async def body(client: httpx.AsyncClient) -> None:
        service.judge.gate = asyncio.Event()
        path = await create(client)
        slow = [asyncio.create_task(client.put(f"{path}/chunks/{n}", content=row("Hello."))) for n in range(2)]
        while service.judge.waiting < 2:
            await asyncio.sleep(0.001)
        response = await client.put(f"{path}/chunks/2", content=row("Hello."))
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
        service.judge.gate.set()
        assert [response.status_code for response in await asyncio.gather(*slow)] == [200, 200]
        assert (await client.put(f"{path}/chunks/2", content=row("Hello."))).status_code == 200

    use(service.app, body)


def test_without_verdicts_a_chunk_is_not_kept(make_filter: Callable[..., Any], row: Row) -> None:
    service = make_filter()

    async def body(client: httpx.AsyncClient) -> None:
        path = await create(client)
        service.judge.failures.append(UnavailableError("none"))
        assert (await client.put(f"{path}/chunks/0", content=row("Hello."))).status_code == 503
        assert (await client.get(path)).json()["next_chunk"] == 0
        assert (await client.put(f"{path}/chunks/0", content=row("Hello."))).status_code == 200

    use(service.app, body)


def test_closing_is_final_and_complete_only_with_every_chunk(make_filter: Callable[..., Any], row: Row) -> None:
    async def body(client: httpx.AsyncClient) -> None:
        path = await create(client)
        await client.put(f"{path}/chunks/1", content=row("Hello."))
        assert (await client.post(f"{path}/close", json={"chunks": 1})).status_code == 400
        assert (await client.post(f"{path}/close", json={"chunks": 2})).status_code == 200
        assert (await client.post(f"{path}/close", json={"chunks": 2})).status_code == 200
        assert (await client.post(f"{path}/close", json={"chunks": 3})).status_code == 409
        assert (await client.put(f"{path}/chunks/2", content=row("Hello."))).status_code == 409
        (trailer,) = await verdicts(client, path)
        assert trailer["done"] is False
        await client.put(f"{path}/chunks/0", content=row("Hello."))
        *found, trailer = await verdicts(client, path)
        assert (len(found), trailer["done"]) == (2, True)

    use(make_filter().app, body)


def test_a_reader_that_waits_gets_verdicts_as_they_come(make_filter: Callable[..., Any], row: Row) -> None:
    async def body(client: httpx.AsyncClient) -> None:
        path = await create(client)
        reading = asyncio.create_task(verdicts(client, path, wait_seconds=20))
        await client.put(f"{path}/chunks/0", content=row("Hello."))
        await client.put(f"{path}/chunks/1", content=row("A bomb."))
        await client.post(f"{path}/close", json={"chunks": 2})
        *found, trailer = await asyncio.wait_for(reading, 10)
        assert [record["decision"] for record in found] == ["allow", "block"]
        assert trailer["done"] is True

    use(make_filter().app, body)


def test_server_sent_events_resume_by_their_last_id(make_filter: Callable[..., Any], row: Row) -> None:
    async def body(client: httpx.AsyncClient) -> None:
        path = await create(client)
        await client.put(f"{path}/chunks/0", content=b"\n".join(map(row, ["a", "b", "c"])))
        await client.post(f"{path}/close", json={"chunks": 1})
        headers = {"accept": "text/event-stream", "last-event-id": "1"}
        response = await client.get(f"{path}/verdicts", headers=headers)
        assert response.headers["content-type"].startswith("text/event-stream")
        first, last, rest = response.text.split("\n\n")
        assert first.startswith("id: 2\nevent: verdict\ndata: {")
        assert last.startswith("event: trailer\ndata: {")
        assert rest == ""
        assert (await client.get(f"{path}/verdicts", headers={"last-event-id": "x"})).status_code == 400

    use(make_filter().app, body)


def test_limits_on_chunks(make_filter: Callable[..., Any], row: Row) -> None:
    async def body(client: httpx.AsyncClient) -> None:
        path = await create(client)
        assert (await client.put(f"{path}/chunks/0", content=b"x" * 2049)).status_code == 413
        assert (await client.put(f"{path}/chunks/-1", content=b"x")).status_code == 400
        assert (await client.put(f"{path}/chunks/3", content=b"x")).status_code == 400

    use(make_filter(max_chunk_bytes=2048, max_chunks=3).app, body)


def test_thresholds_hold_for_the_whole_screening(make_filter: Callable[..., Any], row: Row) -> None:
    async def body(client: httpx.AsyncClient) -> None:
        path = await create(client, reft={"block": 0.05})
        assert (await client.get(path)).json()["thresholds"] == {"review": 0.0, "block": 0.05}
        await client.put(f"{path}/chunks/0", content=row("A knife."))
        assert (await verdicts(client, path))[0]["decision"] == "block"
        assert (await client.post("/screenings/resumable", json={"reft": {"block": 0.9}})).status_code == 400
        assert (await client.post("/screenings/resumable", json={"messages": []})).status_code == 400

    use(make_filter().app, body)


def test_thresholds_that_a_later_teacher_does_not_allow_are_a_conflict(
    make_filter: Callable[..., Any], row: Row
) -> None:
    class Stricter(WordScorer):
        def __init__(self, teacher_id: str) -> None:
            super().__init__(teacher_id)
            self.thresholds = Thresholds(-0.5, 0.05)

    async def body(client: httpx.AsyncClient) -> None:
        path = await create(client, reft={"block": 0.2})
        own = await create(client)
        kept = await client.put(f"{path}/chunks/0", content=row("A knife."))
        service.judge.scorer = Stricter
        refused = await client.put(f"{path}/chunks/1", content=row("A knife."))
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "thresholds_outdated")
        assert "0.05" in refused.json()["error"]["message"]
        assert (await client.put(f"{path}/chunks/0", content=row("A knife."))).json() == kept.json() | {
            "duplicate": True
        }
        assert (await client.put(f"{own}/chunks/0", content=row("A knife."))).json()["counts"]["block"] == 1
        assert (await client.get(path)).json()["rows"] == 1

    service = make_filter()
    use(service.app, body)


def test_nothing_but_verdicts_is_stored(make_filter: Callable[..., Any], row: Row, tmp_path: Path) -> None:
    async def body(client: httpx.AsyncClient) -> None:
        path = await create(client)
        await client.put(f"{path}/chunks/0", content=row("my private words"))
        stored = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
        assert len(stored) == 2
        assert not any(b"private" in data for data in stored)
        assert (await client.delete(path)).json()["deleted"] is True
        assert (await client.get(path)).status_code == 404
        assert [file for file in tmp_path.rglob("*") if file.is_file()] == []

    use(make_filter().app, body)


@pytest.mark.parametrize("name", ["screen-x", "..", "screen-" + "9" * 34, "screen-0000000001" + "a" * 24, "x" * 100])
def test_unknown_screenings_are_404_or_400(make_filter: Callable[..., Any], name: str) -> None:
    async def body(client: httpx.AsyncClient) -> None:
        assert (await client.get(f"/screenings/{name}")).status_code in (400, 404)

    use(make_filter().app, body)


def test_another_projects_screening_does_not_exist(tmp_path: Path) -> None:
    store = ScreeningStore(str(tmp_path), FilterSettings())
    state = store.create("project-a", None, None, {})
    assert store.state(state.about.id, "project-a").about == state.about
    with pytest.raises(Exception, match="No such screening"):
        store.state(state.about.id, "project-b")


def test_expired_screenings_are_swept_and_their_number_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    store = ScreeningStore(str(tmp_path), FilterSettings(max_screenings=2, screening_seconds=100))
    first = store.create(None, None, None, {})
    store.create(None, None, None, {})
    with pytest.raises(Exception, match="2 screenings are open"):
        store.create(None, None, None, {})
    monkeypatch.setattr(time, "time", lambda: now + 200)
    with pytest.raises(Exception, match="No such screening"):
        store.state(first.about.id, None)
    store.create(None, None, None, {})
    assert len(list(tmp_path.iterdir())) == 1


def test_one_project_uses_up_no_other_projects_screenings(tmp_path: Path) -> None:
    store = ScreeningStore(str(tmp_path), FilterSettings(max_screenings=2, max_screenings_in_all=3))
    for _ in range(2):
        first = store.create("project-a", None, None, {})
    with pytest.raises(ApiError, match="2 screenings are open, the limit of a project") as full:
        store.create("project-a", None, None, {})
    assert full.value.status == 429
    store.create("project-b", None, None, {})
    with pytest.raises(ApiError, match="3 screenings are open, the limit of this service"):
        store.create("project-b", None, None, {})
    store.delete(first)
    store.create("project-b", None, None, {})


def test_two_gateways_share_the_state(tmp_path: Path, row: Row) -> None:
    apps = [
        create_filter_app(LocalModerator(WordScorer()), HERE, screenings_uri=f"file://{tmp_path}/shared")
        for _ in range(2)
    ]
    clients = [httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://filter/v1") for app in apps]

    async def run() -> None:
        path = await create(clients[0])
        await asyncio.gather(
            *(
                client.put(f"{path}/chunks/{number}", content=row(f"row {number}"))
                for number in range(4)
                for client in clients
            )
        )
        await clients[0].post(f"{path}/close", json={"chunks": 4})
        left, right = [await verdicts(client, path) for client in clients]
        assert left == right
        assert [record.get("row") for record in left] == [0, 1, 2, 3, None]
        for client in clients:
            await client.aclose()

    asyncio.run(run())


def test_without_a_store_the_resource_says_so() -> None:
    async def body(client: httpx.AsyncClient) -> None:
        assert (await client.post("/screenings/resumable", json={})).status_code == 501

    use(create_filter_app(LocalModerator(WordScorer()), HERE), body)
