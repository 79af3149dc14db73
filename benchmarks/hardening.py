"""Hostile calls on a service in a process of its own: what each cost, as the table in docs/threat-model.md has it.

    python benchmarks/hardening.py [--database URL] [--only NAME]

The application runs with the word scorer, the echo model and fake steps, as `uvicorn` serves it on loopback.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from fixtures.service_process import ServiceProcess, started

MIB = 1 << 20
ROW = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
ROWS = json.dumps(ROW).encode() + b"\n"


class Service:
    """A running service, and what it costs."""

    def __init__(self, running: ServiceProcess) -> None:
        self.url, self.database, self.client = running.url, running.database, running.client
        self.process = psutil.Process(running.process.pid)
        self.waits: list[float] = []
        self.peak = 0.0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Ask `/healthz` and read the memory all the time: the longest wait, the peak in MB."""
        ended, self.waits, self.peak = threading.Event(), [0.0], 0.0

        def watch() -> None:
            with httpx.Client(base_url=self.url, timeout=120) as client:
                while not ended.wait(0.02):
                    started = time.perf_counter()
                    client.get("/healthz")
                    self.waits.append(time.perf_counter() - started)

        def weigh() -> None:
            while not ended.wait(0.01):
                self.peak = max(self.peak, self.process.memory_info().rss / 1e6)

        threads = [threading.Thread(target=each) for each in (watch, weigh)]
        for thread in threads:
            thread.start()
        yield
        ended.set()
        for thread in threads:
            thread.join()

    @property
    def cost(self) -> str:
        """What `watched` saw."""
        return f"/healthz waited {max(self.waits):.2f} s, peak {self.peak:,.0f} MB"


@contextmanager
def service(database: str | None, **settings: str) -> Iterator[Service]:
    """Start a service with empty stores."""
    with tempfile.TemporaryDirectory() as root:
        url = database or f"sqlite:///{root}/state/jobs.db"
        with started(Path(root), url, **settings) as running:
            yield Service(running)


def timed(call: Callable[[], httpx.Response]) -> tuple[str, float]:
    """Status and seconds of a call."""
    started = time.perf_counter()
    try:
        status = str(call().status_code)
    except httpx.TransportError as error:
        status = type(error).__name__
    return status, time.perf_counter() - started


def without_key(run: Service) -> Iterator[str]:
    """A large body from a stranger."""
    run.client("a").close()
    body = b'{"bytes":1,"filename":[' + b"[]," * (21 * MIB) + b"[]]}"
    for path in ("/v1/uploads", "/v1/uploads/x/complete", "/v1/moderations"):
        content = body if "uploads" in path else b'{"input":[' + b"[]," * (4 * MIB // 3 - 10) + b"[]]}"
        with run.watched(), httpx.Client(base_url=run.url, timeout=120) as client:
            headers = {"content-type": "application/json"}
            status, seconds = timed(lambda: client.post(path, content=content, headers=headers))  # noqa: B023
        yield f"{len(content) / MIB:.0f} MiB to {path} without a key: {status} after {seconds:.2f} s, {run.cost}"


def slow_names(run: Service) -> Iterator[str]:
    """Webhooks whose names resolve slowly."""
    hostile, other = run.client("a"), run.client("b")
    with ThreadPoolExecutor(60) as pool:
        for number in range(120):
            body = {"url": f"https://n{number}.slow.test/hook"}
            pool.submit(hostile.post, "/v1/webhook_endpoints", json=body)
        time.sleep(0.5)
        models = timed(lambda: other.get("/v1/models"))
        words = timed(lambda: other.post("/v1/moderations", json={"input": "bread"}))
        yield f"120 endpoints with silent names: another tenant's models {models[1]:.2f} s, moderation {words[1]:.2f} s"
        pool.shutdown(cancel_futures=True)


def web_pages(run: Service) -> Iterator[str]:
    """Pages of other sites, without keys."""
    client = httpx.Client(base_url=run.url)
    file = {"file": ("a.jsonl", ROWS)}
    data = {"purpose": "fine-tune"}
    for name, headers, call in (
        ("Host: evil.example, GET /v1/files", {"host": "evil.example"}, ("GET", "/v1/files", {})),
        ("Origin: http://evil.example, POST /v1/files", {"origin": "http://evil.example"}, ("POST", "/v1/files", {"files": file, "data": data})),
        ("Sec-Fetch-Site: cross-site, GET /v1/files", {"sec-fetch-site": "cross-site"}, ("GET", "/v1/files", {})),
    ):  # fmt: skip
        method, path, options = call
        yield f"{name}: {client.request(method, path, headers=headers, **options).status_code}"


def streams(run: Service) -> Iterator[str]:
    """Streams that are kept open."""
    hostile, other = run.client("a"), run.client("b")
    ended = threading.Event()

    def drip() -> Iterator[bytes]:
        while not ended.is_set():
            yield ROWS
            ended.wait(2)

    def hold() -> None:
        with hostile.stream("POST", "/v1/screenings", content=drip()) as response:
            for _ in response.iter_lines():
                pass

    threads = [threading.Thread(target=hold) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(2)
    statuses = [other.post("/v1/screenings", content=ROWS).status_code for _ in range(5)]
    ended.set()
    for thread in threads:
        thread.join()
    yield f"eight slow streams of a tenant: another one's screenings {statuses}"


def verdicts(run: Service) -> Iterator[str]:
    """A chunk of empty rows."""
    client = run.client("a")
    made = client.post("/v1/screenings/resumable", json={}).json()["id"]
    with run.watched():
        status, seconds = timed(lambda: client.put(f"/v1/screenings/{made}/chunks/0", content=b"\n" * MIB))
    yield f"a chunk of 1 MiB of line feeds: {status} after {seconds:.1f} s, {run.cost}"
    with run.watched():
        answer = client.get(f"/v1/screenings/{made}/verdicts")
    yield f"reading its verdicts: {len(answer.content) / MIB:.1f} MiB, {run.cost}"


def spooled(run: Service) -> Iterator[str]:
    """Bodies that are refused in the end."""
    client = run.client("a")
    client.post("/v1/files", files={"file": ("a.jsonl", ROWS * 15_000)}, data={"purpose": "fine-tune"})
    before = run.process.io_counters().write_bytes
    part = b"x" * (63 * MIB)
    with ThreadPoolExecutor(4) as pool:
        calls = [
            pool.submit(client.post, "/v1/files", files={"file": ("a.jsonl", ROWS * 600_000)}, data={"purpose": "fine-tune"})
            for _ in range(4)
        ]  # fmt: skip
        statuses = [call.result().status_code for call in calls]
    written = run.process.io_counters().write_bytes - before
    yield f"4 x 64 MB over the quota: {statuses}, {written / MIB:.0f} MiB written meanwhile"
    before = run.process.io_counters().write_bytes
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(client.post, "/v1/uploads/upload_x/parts", files={"data": part}) for _ in range(4)]
        statuses = [call.result().status_code for call in calls]
    written = run.process.io_counters().write_bytes - before
    yield f"4 x 63 MiB of parts without an upload: {statuses}, {written / MIB:.0f} MiB written meanwhile"


def deleted_files(run: Service) -> Iterator[str]:
    """A job and the deletion of its file at once."""
    client = run.client("a", unfinished_jobs=1000)
    bad = 0
    for _ in range(10):
        made = client.post("/v1/files", files={"file": ("a.jsonl", ROWS)}, data={"purpose": "fine-tune"}).json()["id"]
        start = threading.Barrier(2)
        body = {"model": "tiny", "training_file": made}

        def create() -> int:
            start.wait()  # noqa: B023
            return client.post("/v1/fine_tuning/jobs", json=body).status_code  # noqa: B023

        def delete() -> int:
            start.wait()  # noqa: B023
            return client.delete(f"/v1/files/{made}").status_code  # noqa: B023

        with ThreadPoolExecutor(2) as pool:
            first, second = pool.submit(create), pool.submit(delete)
            bad += first.result() == 200 and second.result() == 200
    yield f"a job created while its file is deleted: both succeeded in {bad} of 10 rounds"


def filters(run: Service) -> Iterator[str]:
    """Metadata keys with a meaning in JSON paths."""
    client = run.client("a")
    made = client.post("/v1/files", files={"file": ("a.jsonl", ROWS)}, data={"purpose": "fine-tune"}).json()["id"]
    keys = ['a"b', "\\", "é", ".", "a.b", "\x01", "a'b", "[0]", "$", "名", " ", '"', "a\\b"]
    found: list[Any] = []
    for key in keys:
        body = {"model": "tiny", "training_file": made, "metadata": {key: "x"}}
        job = client.post("/v1/fine_tuning/jobs", json=body).json()["id"]
        answer = client.get("/v1/fine_tuning/jobs", params={f"metadata[{key}]": "x"})
        found.append(answer.status_code if answer.is_error else [each["id"] for each in answer.json()["data"]] == [job])
    missed = sum(each is not True for each in found)
    nul = client.get("/v1/fine_tuning/jobs", params={"metadata[\x00]": "x"}).status_code
    many = client.get("/v1/fine_tuning/jobs?" + "&".join(f"metadata[k{n}]=x" for n in range(1500))).status_code
    yield f"metadata filters: {missed} of {len(keys)} keys not found; a NUL {nul}; 1,500 filters {many}"


def overdrawn(run: Service) -> Iterator[str]:
    """Completions beyond the limit of tokens."""
    client = run.client("a", tokens_per_minute=20_000)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "word " * 1500}]}
    with ThreadPoolExecutor(40) as pool:
        calls = [pool.submit(client.post, "/v1/chat/completions", json=body) for _ in range(40)]
        answers = [call.result() for call in calls]
    used = sum(answer.json()["usage"]["total_tokens"] for answer in answers if answer.is_success)
    yield f"40 completions at a limit of 20,000 tokens: {used:,} tokens used"


def private(run: Service) -> Iterator[str]:
    """Modes of files."""
    client = run.client("a")
    client.post("/v1/files", files={"file": ("a.jsonl", ROWS)}, data={"purpose": "fine-tune"})
    if not run.database.startswith("sqlite"):
        return
    state = Path(run.database.removeprefix("sqlite:///")).parent
    kept = [next(path for path in state.parent.rglob("file-*") if path.is_file()), state / "jobs.db"]
    yield "modes: " + ", ".join(f"{path.name.split('-')[0]} {path.stat().st_mode & 0o777:o}" for path in kept)


CASES = [
    without_key, slow_names, web_pages, streams, verdicts, spooled, deleted_files, filters, overdrawn, private,
]  # fmt: skip


def main() -> None:
    """Print a line per measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database")
    parser.add_argument("--only")
    options = parser.parse_args()
    for case in CASES:
        if options.only in (None, case.__name__):
            with service(options.database, **({"QUOTA": "2000000"} if case is spooled else {})) as run:
                for line in case(run):
                    print(f"{case.__name__}: {line}", flush=True)


if __name__ == "__main__":
    main()
