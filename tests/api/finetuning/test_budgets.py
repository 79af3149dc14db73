"""What a hostile body may cost the service: memory, the event loop's time, bytes of output. In full: `-m slow`."""

import json
import math
import re
import statistics
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import psutil
import pytest
from fixtures.service_process import started

MIB = 1 << 20
ROW = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
PEAK_MB, LAG_SECONDS, OUTPUT_BYTES = 120, 1.0, 16 * MIB
"""Of any request: memory above that of the idle service, longest wait of another caller, size of the answer."""

HOSTILE = {
    "lists": lambda size: b'{"input":[' + b"[]," * (size // 3) + b"[]]}",
    "numbers": lambda size: b'{"bytes":[' + b"1," * (size // 2) + b"1]}",
    "objects": lambda size: b'{"model":[' + b"{}," * (size // 3) + b"{}]}",
    "strings": lambda size: b'{"messages":[' + b'"",' * (size // 3) + b'""]}',
    "depth": lambda size: b'{"a":' * (size // 5),
    "one string": lambda size: b'{"input":"' + b"a" * size + b'"}',
    "escapes": lambda size: b'{"input":"' + b"\\u00e9" * (size // 6) + b'"}',
    "one number": lambda size: b'{"seed":' + b"9" * size + b"}",
    "line feeds": lambda size: b"\n" * size,
    "not JSON": lambda size: b"\xff" * size,
}


class Watch:
    """The service's memory, and how long `/healthz` waits, during a block; the wait is held to `lag` seconds."""

    def __init__(self, url, process, lag):
        self.url, self.process, self.lag = url, psutil.Process(process.pid), lag
        self.idle = self.process.memory_info().rss

    @contextmanager
    def __call__(self, what):
        ended, waits, peaks = threading.Event(), [0.0], [0.0]

        def ask():
            with httpx.Client(base_url=self.url, timeout=60) as client:
                while not ended.wait(0.02):
                    begun = time.perf_counter()
                    client.get("/healthz")
                    waits.append(time.perf_counter() - begun)

        def weigh():
            while not ended.wait(0.01):
                peaks.append(self.process.memory_info().rss - self.idle)

        threads = [threading.Thread(target=ask), threading.Thread(target=weigh)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            ended.set()
            for thread in threads:
                thread.join()
        assert max(peaks) < PEAK_MB * 1e6, f"{what}: {max(peaks) / 1e6:.0f} MB"
        assert max(waits) < self.lag, f"{what}: /healthz waited {max(waits):.2f} s"


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgresql", marks=pytest.mark.servers)])
def service(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("budgets")
    url = f"sqlite:///{root / 'state' / 'jobs.db'}"
    if request.param == "postgresql":
        url = request.getfixturevalue("new_postgres")()
    with started(root, url) as running:
        yield running


def limits(url):
    """Method and path of every route that takes a body, and the size that it is sent."""
    document = httpx.get(f"{url}/openapi.json", timeout=60).json()
    for path, operations in document["paths"].items():
        if path.startswith("/v1/"):
            yield from ((method.upper(), re.sub(r"\{\w+\}", "0", path)) for method in operations if method != "get")


def send(client, method, path, body):
    """Send a body whole; the number of bytes of the answer, of which no more than the budget are read."""
    read = 0
    try:
        with client.stream(method, path, content=body, headers={"content-type": "application/json"}) as answer:
            assert answer.status_code < 500, (method, path, answer.status_code)
            for piece in answer.iter_bytes():
                read += len(piece)
                if read > OUTPUT_BYTES:
                    break
    except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
        return 0  # refused while it was being sent
    return read


def hold(service, kinds, sizes):
    keyed, stranger = service.client("one"), httpx.Client(base_url=service.url, timeout=60)
    watch = Watch(service.url, service.process, LAG_SECONDS)
    for method, path in limits(service.url):
        for name in kinds:
            for size in sizes:
                body = HOSTILE[name](size)
                for client in (keyed, stranger):
                    with watch(f"{method} {path}, {size} bytes of {name}"):
                        assert send(client, method, path, body) <= OUTPUT_BYTES
    stranger.close()


def test_a_hostile_body_stays_within_the_budget(service):
    """The short form: the memory for the dearest body on each kind of route, however busy the machine is."""
    keyed, watch = service.client("one"), Watch(service.url, service.process, math.inf)
    for method, path, name in (
        ("POST", "/v1/uploads", "lists"),
        ("POST", "/v1/moderations", "lists"),
        ("POST", "/v1/chat/completions", "strings"),
        ("POST", "/v1/screenings", "line feeds"),
    ):
        body = HOSTILE[name](4 * MIB - 100 if "uploads" not in path else 32 * MIB)
        with watch(f"{method} {path}: {name}"):
            send(keyed, method, path, body)
            if "screenings" not in path:
                send(httpx, method, f"{service.url}{path}", body)


@pytest.mark.slow
def test_every_hostile_body_on_every_route_stays_within_the_budget(service):
    hold(service, HOSTILE, (MIB // 4 - 100, 4 * MIB - 100, 32 * MIB))


def p99(seconds):
    return statistics.quantiles(seconds, n=100)[98]


def measured(client, calls):
    """The p99 of another tenant's calls, in seconds."""
    waits = []
    for number in range(calls):
        begun = time.perf_counter()
        answer = client.get("/v1/models") if number % 2 else client.post("/v1/moderations", json={"input": "bread"})
        assert answer.status_code == 200, answer.text
        waits.append(time.perf_counter() - begun)
    return p99(waits)


def noisy(service, calls, ready, requests_per_minute=600):
    """p99 of one tenant alone, and with another at its limits: requests, streams, endpoints; the latter's statuses.

    The second is measured once `ready(seconds, statuses)` holds.
    """
    other, hostile = service.client("other"), service.client("hostile", requests_per_minute=requests_per_minute)
    alone = measured(other, calls)
    ended, statuses, answered = threading.Event(), Counter(), threading.Semaphore(0)

    def press(number):
        body = json.dumps(ROW).encode() + b"\n"
        while not ended.is_set():
            try:
                match number % 4:
                    case 0:
                        answer = hostile.post("/v1/moderations", json={"input": "bread " * 10_000})
                    case 1:
                        answer = hostile.post("/v1/screenings", content=body * 2_000)
                    case 2:
                        answer = hostile.get("/v1/fine_tuning/jobs", params={"limit": 1000})
                    case 3:
                        answer = hostile.post("/v1/webhook_endpoints", json={"url": "https://hooks.example.com/x"})
                statuses[answer.status_code] += 1
            except httpx.TransportError:
                pass
            answered.release()

    with ThreadPoolExecutor(16) as pool:
        for number in range(16):
            pool.submit(press, number)
        begun = time.monotonic()
        try:
            while not ready(time.monotonic() - begun, statuses):
                assert answered.acquire(timeout=60), "the service has stopped answering"
            beside = measured(other, calls)
        finally:
            ended.set()
    return alone, beside, statuses


def at_its_limit(_, statuses):
    return statuses[429] > statuses[200] > 0


def test_beside_a_tenant_at_its_limits_every_call_of_another_is_answered(service):
    """The short form: no call is refused; how long each took is not judged."""
    _, _, statuses = noisy(service, 20, at_its_limit, requests_per_minute=10)
    assert at_its_limit(0, statuses)


@pytest.mark.slow
def test_one_tenant_at_its_limits_changes_anothers_p99_by_less_than_twice(service):
    # The hostile tenant's minute of requests is used up.
    noisy(service, 100, lambda seconds, _: seconds > 61)
    alone, beside, _ = noisy(service, 400, lambda seconds, _: seconds > 5)
    assert beside < 2 * alone + 0.02, (alone, beside)
