"""What a call costs its project is settled before it is served: tokens, bytes, parts."""

import asyncio

import pytest

from reft_ray.api.chat_schema import InlineModeration
from reft_ray.api.settings import ChatModes
from reft_ray.jobs.errors import TooLargeError
from reft_ray.jobs.uploads import MAX_PARTS

ROW = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}\n'
FORM = {"content-type": "multipart/form-data; boundary=x", "content-length": str(40 << 20)}


def test_a_file_that_cannot_be_stored_is_not_received(running):
    """A full project, an upload that is not there or too small: answered by the headers, not a byte is read."""
    service = running(service={"max_project_bytes": 1024})
    service.stores.files.create("proj_x", "a.jsonl", "fine-tune", [ROW])
    key = service.key()
    project = service.stores.tenants.authenticate(key["authorization"].split()[1]).project_id
    small = service.stores.uploads.create(project, "a.jsonl", "fine-tune", 100, "text/plain").id

    async def ask(path):
        return await service.call("POST", path, key | FORM)

    for path, status in (
        ("/v1/files", 429),
        ("/v1/uploads/upload_x/parts", 404),
        (f"/v1/uploads/{small}/parts", 413),
    ):
        found, text, asked = asyncio.run(ask(path))
        assert (found, asked) == (status, 0), text


def test_completions_together_stay_within_the_limit_of_tokens(running):
    service = running()
    key = service.key(tokens_per_minute=20_000)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "word " * 1500}], "max_tokens": 1500}

    async def ask():
        async with service.client(headers=key) as client:
            answers = await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for _ in range(20)))
            many = await client.post("/v1/chat/completions", json=body | {"n": 8, "max_tokens": 4096})
            return answers, many

    answers, many = asyncio.run(ask())
    used = sum(answer.json()["usage"]["total_tokens"] for answer in answers if answer.is_success)
    assert 0 < used <= 20_000 + 3_000
    assert {answer.status_code for answer in answers} == {200, 429}
    assert (many.status_code, "too large" in many.text) == (429, True)


@pytest.mark.parametrize("path", ["/v1/moderations", "/v1/screenings", "chunk"])
def test_texts_that_the_teacher_reads_are_charged(running, path):
    service = running()
    key = service.key(moderation_tokens_per_minute=25_000)

    async def ask():
        async with service.client(headers=key) as client:
            row = b'{"text": "' + b"bread " * 11_000 + b'"}\n'
            made = (await client.post("/v1/screenings/resumable", json={})).json()["id"]
            answers = []
            for number in range(3):
                match path:
                    case "/v1/moderations":
                        answers.append(await client.post(path, json={"input": "bread " * 11_000}))
                    case "/v1/screenings":
                        answers.append(await client.post(path, content=row))
                    case _:
                        answers.append(await client.put(f"/v1/screenings/{made}/chunks/{number}", content=row))
            return answers

    first, _, third = asyncio.run(ask())
    assert first.status_code == 200
    assert '"done":false' not in first.text
    assert third.status_code == 429 or "rate_limit_exceeded" in third.text


def test_rows_of_a_chunk_are_bounded(running):
    service = running(max_chunk_rows=10)

    async def ask():
        async with service.client(headers=service.key()) as client:
            made = (await client.post("/v1/screenings/resumable", json={})).json()["id"]
            path = f"/v1/screenings/{made}/chunks/0"
            return [(await client.put(path, content=b"\n" * rows)).status_code for rows in (11, 10)]

    assert asyncio.run(ask()) == [400, 200]


def test_an_upload_has_so_many_parts_and_keeps_none_when_it_is_closed(running, monkeypatch):
    service = running()
    uploads = service.stores.uploads
    opened = uploads.create("proj_a", "a.jsonl", "fine-tune", 10, "text/plain")
    uploads.add_part(opened.id, "proj_a", [b"x"])
    monkeypatch.setattr("reft_ray.jobs.uploads.MAX_PARTS", 1)
    assert MAX_PARTS == 10_000
    with pytest.raises(TooLargeError, match="up to 1 parts"):
        uploads.check_room(opened.id, "proj_a", 1)
    uploads.cancel(opened.id, "proj_a")
    with service.stores.database.read() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM upload_parts").scalar() == 0


@pytest.mark.parametrize("seconds", ["9" * 30, "9" * 5000, "-1", "٣٦٠٠", "1e9", "0", "3599"])
def test_an_impossible_lifetime_is_refused_where_it_is_asked_for(running, seconds):
    service = running()

    async def ask():
        async with service.client(headers=service.key()) as client:
            data = {"purpose": "user_data", "expires_after[anchor]": "created_at", "expires_after[seconds]": seconds}
            form = await client.post("/v1/files", files={"file": ("a", b"x")}, data=data)
            lifetime = b'{"anchor":"created_at","seconds":' + seconds.encode() + b"}"
            body = b'{"bytes":1,"filename":"a","mime_type":"b","purpose":"user_data","expires_after":' + lifetime + b"}"
            part = await client.post("/v1/uploads", content=body, headers={"content-type": "application/json"})
            return form.status_code, part.status_code

    assert asyncio.run(ask()) == (400, 400)


@pytest.mark.parametrize(
    "asked", [None, InlineModeration().model_dump(exclude_none=True), {"policy": {"input": {"mode": "score"}}}]
)
def test_the_operator_can_require_moderation(running, asked):
    service = running(service={"chat_moderation": {}})

    async def ask(text):
        async with service.client(headers=service.key()) as client:
            body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "moderation": asked}
            return (await client.post("/v1/chat/completions", json=body)).json()

    assert asyncio.run(ask("How do I build a bomb?"))["choices"][0]["finish_reason"] == "content_filter"
    assert asyncio.run(ask("How do I bake bread?"))["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_the_operator_requires_moderation_of_single_projects(running, path, stream):
    modes = {"input": "none", "output": "none", "projects": {}}
    service = running(service={"chat_moderation": modes})
    keys = {name: service.key(name) for name in ("strict", "free")}
    found = service.stores.tenants.authenticate(keys["strict"]["authorization"].split()[1])
    settings = service.stores.settings.chat_moderation
    settings.projects[found.project_id] = ChatModes(input="none", output="block")
    harm = "Build a bomb"
    body = {"model": "tiny", "stream": stream, "temperature": 0, "max_tokens": 20}
    body |= {"prompt": harm} if path == "completions" else {"messages": [{"role": "user", "content": harm}]}

    async def ask(project):
        async with service.client(headers=keys[project]) as client:
            return (await client.post(f"/v1/{path}", json=body)).text

    strict, free = asyncio.run(ask("strict")), asyncio.run(ask("free"))
    assert ("content_filter" in strict, "bomb" in strict) == (True, False)
    assert ("content_filter" in free, "bomb" in free, "moderation" in free) == (False, True, False)
