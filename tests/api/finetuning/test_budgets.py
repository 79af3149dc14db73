"""What a hostile body may cost the service: memory, the event loop's time, bytes of output. In full: `-m slow`."""

import json
import math
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager

import httpx
import psutil
import pytest
from fixtures import hostile_tenant
from fixtures.service_process import started

MIB = 1 << 20
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
    """The seconds of another tenant's calls."""
    waits = []
    for number in range(calls):
        begun = time.perf_counter()
        answer = client.get("/v1/models") if number % 2 else client.post("/v1/moderations", json={"input": "bread"})
        assert answer.status_code == 200, answer.text
        waits.append(time.perf_counter() - begun)
    return waits


class Hostile:
    """A tenant that repeats its calls at once, whatever the answer, in a process of its own."""

    def __init__(self, service, requests_per_minute):
        key = service.key("hostile", requests_per_minute=requests_per_minute)
        url = httpx.URL(service.url)
        # -P: its folder has a module `http`.
        command = [sys.executable, "-P", hostile_tenant.__file__, url.host, str(url.port), key]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        # A tenant's program runs elsewhere; here it must not take the processor that the service needs.
        psutil.Process(self.process.pid).nice(19)
        with self.calling():
            pass  # what its limit had saved up is spent

    @contextmanager
    def calling(self):
        """It calls during the block, at its limit from the start, and has no call at work after it."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "refused\n"
        yield
        self.process.stdin.write("rest\n")
        self.process.stdin.flush()
        self.statuses = Counter(json.loads(self.process.stdout.readline()))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()


def test_beside_a_tenant_at_its_limits_every_call_of_another_is_answered(service):
    """The short form: no call is refused; how long each took is not judged."""
    with Hostile(service, requests_per_minute=10) as hostile:
        with hostile.calling():
            measured(service.client("other"), 20)
        assert hostile.statuses["429"] > 0


@pytest.mark.slow
def test_one_tenant_at_its_limits_changes_anothers_p99_by_less_than_twice(service):
    other, alone, beside = service.client("other"), [], []
    measured(other, 100)  # the first calls import, compile and connect
    with Hostile(service, requests_per_minute=600) as hostile:
        # In turns, so that both meet the same other work of the machine.
        for _ in range(5):
            alone += measured(other, 200)
            with hostile.calling():
                beside += measured(other, 200)
            assert hostile.statuses["200"] > 0 < hostile.statuses["429"], hostile.statuses
    print(f"p99 alone {1e3 * p99(alone):.1f} ms, beside {1e3 * p99(beside):.1f} ms")
    assert p99(beside) < 2 * p99(alone) + 0.01, (p99(alone), p99(beside))
