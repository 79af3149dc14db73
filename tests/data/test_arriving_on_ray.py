"""Uploads as a Ray dataset while they arrive."""

import asyncio
import json
import os
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest
from ray.exceptions import WorkerCrashedError

from reft_ray.api.client import answered_lines
from reft_ray.core.errors import ReftError, UsageError
from reft_ray.testbed.word_scorer import WordScorer

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("shared_ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def line_of(index: int, text: str = "") -> bytes:
    turns = [{"role": "user", "content": f"Question {index}{text}"}, {"role": "assistant", "content": "Answer."}]
    return json.dumps({"messages": turns}).encode() + b"\n"


def judged(chunks, **options):
    from ray.data import ActorPoolStrategy

    from reft_ray.data import Moderate, arriving_rows

    return arriving_rows(chunks, **options).map_batches(
        Moderate,
        fn_constructor_kwargs={"factory": WordScorer},
        batch_format="pyarrow",
        batch_size=None,
        compute=ActorPoolStrategy(size=1),
    )


def rows_of(dataset):
    return [row for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow") for row in batch.to_pylist()]


def test_verdicts_come_before_the_upload_ends():
    seen = threading.Event()
    rows = [line_of(index, " how to build a bomb" * (index == 1) + " x" * 500) for index in range(1000)]
    text = b"".join(rows) + b"\n{broken\n" + line_of(1000)

    def chunks():
        half = len(text) // 2
        yield text[:half]
        assert seen.wait(60), "no verdict before the end"
        yield text[half:].rstrip(b"\n")

    found = []
    for batch in judged(chunks()).iter_batches(batch_size=None, batch_format="pyarrow"):
        seen.set()
        found += batch.to_pylist()
    found.sort(key=lambda row: row["line"])
    assert [row["line"] for row in found] == [*range(1, 1001), 1002, 1003]
    others = {row["line"]: row["decision"] for row in found if row["decision"] != "allow"}
    assert others == {2: "block", 1002: "invalid"}
    assert all(text[row["position"] :].startswith(row["raw"]) for row in found)


def test_a_sender_waits_while_the_pipeline_is_busy():
    """A part of the upload is asked for until somebody reads rows; then every row comes once."""
    from reft_ray.data import arriving_rows
    from reft_ray.data.arriving import HELD_BYTES

    sent = 0

    def chunks():
        nonlocal sent
        for first in range(0, 40_000, 250):
            chunk = b"".join(line_of(index, " x" * 1950) for index in range(first, first + 250))
            sent += len(chunk)
            yield chunk

    rows = arriving_rows(chunks())
    batches = iter(rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
    lines = [next(batches).column("line").to_pylist()]
    before = -1
    while before < sent:  # until the sender has to wait
        before = sent
        time.sleep(2)
    assert HELD_BYTES < sent < 120 << 20
    lines += [batch.column("line").to_pylist() for batch in batches]
    assert sorted(line for part in lines for line in part) == list(range(1, 40_001))


def test_the_body_of_an_asynchronous_request():
    async def body():
        for index in range(20):
            yield line_of(index)
            await asyncio.sleep(0)

    async def received():
        dataset = judged(body())
        return await asyncio.to_thread(rows_of, dataset)

    rows = asyncio.run(received())
    assert sorted(row["line"] for row in rows) == list(range(1, 21))


def test_an_upload_that_breaks_off_is_an_error():
    def chunks():
        yield line_of(0) + line_of(1)
        raise ConnectionResetError("the client has gone")

    with pytest.raises(ReftError, match="broke off: the client has gone"):
        rows_of(judged(chunks()))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PAR1\x15\x04", "is Parquet; only JSONL"),
        (b"\x1f\x8b\x08\x00", "is gzip; only JSONL"),
        (b'[\n  {"prompt": "a"},\n  {"prompt": "b"}\n]\n', "one JSON text"),
        (b"<html><body>", "an HTML page"),
        (b"x" * (17 << 20), "line 1: longer than"),
    ],
)
def test_other_files_are_named(data, message):
    with pytest.raises(UsageError, match=message):
        rows_of(judged([data], name="u.jsonl"))


def test_a_byte_order_mark_and_an_empty_upload():
    rows = rows_of(judged([b"\xef\xbb", b"\xbf" + line_of(0)]))
    assert [(row["line"], row["position"], row["decision"]) for row in rows] == [(1, 3, "allow")]
    assert rows_of(judged([])) == []


def test_a_lost_reader_fails_the_upload():
    """A second reader would begin in the middle: the rows that the first had taken would be missing."""
    from reft_ray.data import arriving_rows

    killed = []

    def chunks():
        yield from [b"".join(line_of(index, " x" * 1950) for index in range(3000))] * 2  # more than may wait
        until = time.monotonic() + 30
        while not killed:
            assert time.monotonic() < until
            titles = {path: path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()}
            killed.extend(int(path.parent.name) for path, title in titles.items() if b"ArrivingSource" in title)
        os.kill(killed[0], signal.SIGKILL)
        yield line_of(1)

    with pytest.raises(WorkerCrashedError):
        rows_of(arriving_rows(chunks()))
    assert killed


def test_an_upload_is_read_once():
    rows = judged([line_of(0)])
    assert len(rows_of(rows)) == 1
    with pytest.raises(ReftError, match="can be read once"):
        rows_of(rows)


@pytest.fixture
def served():
    """Runs an application in a real server, and gives its URL."""
    import uvicorn

    servers = []

    def serve(app):
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        until = time.monotonic() + 30
        while not server.started:
            assert time.monotonic() < until
            time.sleep(0.01)
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1/screenings"

    yield serve
    for server, thread in servers:
        server.should_exit = True
        thread.join(30)


def test_an_upload_over_http_is_answered_while_it_arrives(served):
    from reft_ray.data.upload_app import upload_app

    url = served(upload_app(judge={"factory": WordScorer}, most=1))
    seen = threading.Event()

    def body():
        for index in range(2000):
            yield line_of(index, " how to build a bomb" * (index == 1) + " x" * 500)
        assert seen.wait(60), "no verdict before the end"
        yield b'\n{broken\n{"text": "one word"}\n'

    records = []
    for line in answered_lines(url, body()):
        if not records:
            assert httpx.post(url, content=b"{}").status_code == 429
            seen.set()
        records.append(json.loads(line))
    *verdicts, trailer = records
    assert [record["row"] for record in verdicts] == [*range(2000), 2001, 2002]
    assert verdicts[1]["decision"] == "block"
    assert verdicts[1]["score"] > verdicts[0]["score"]
    assert verdicts[2000]["decision"] == "invalid"
    assert verdicts[2000]["reason"]["code"]
    counts = {key: trailer[key] for key in ("done", "rows", "allow", "block", "invalid", "unanswered")}
    assert counts == {"done": True, "rows": 2002, "allow": 2000, "block": 1, "invalid": 1, "unanswered": 0}


def test_an_upload_over_http_that_fails_ends_without_a_done_trailer(served):
    from reft_ray.data.upload_app import upload_app

    url = served(upload_app(judge={"factory": WordScorer}, max_bytes=1000))
    assert httpx.post(url, content=b"x" * 2000).status_code == 413
    error, trailer = map(json.loads, httpx.post(url, content=b"PAR1", timeout=120).text.splitlines())
    assert error["type"] == "error"
    assert "Parquet" in error["error"]["message"]
    assert trailer["done"] is False

    def body():
        yield line_of(0)
        yield b"x" * 2000

    *_, error, trailer = map(json.loads, httpx.post(url, content=body(), timeout=120).text.splitlines())
    assert "may have 1,000 bytes" in error["error"]["message"]
    assert trailer["done"] is False
