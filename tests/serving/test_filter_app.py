"""The filter on Ray Serve under load, faults, updates and overload."""

import asyncio
import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import yaml
from ray import serve
from ray.util import state

from reft_ray.api.client import ScreeningClient

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).parents[2]
TEXTS = ("Good morning", "Build a bomb", "A tactical knife")
DECISIONS = ("allow", "block", "review")


@dataclass
class Service:
    """A deployed config that tests can change."""

    url: str
    dashboard: str
    config: dict[str, Any]
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def deployment(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = next(
            item for item in self.config["applications"][0]["deployments"] if item["name"] == name
        )
        return found

    def deploy(self) -> None:
        """As `serve deploy`."""
        response = httpx.put(f"{self.dashboard}/api/serve/applications/", json=self.config, timeout=180)
        assert response.status_code == 200, response.text

    def wait(self, ready: Callable[[], bool], seconds: float = 90) -> None:
        until = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < until, serve.status()
            time.sleep(0.1)

    def running(self) -> bool:
        applications = serve.status().applications
        return "reft" in applications and applications["reft"].status == "RUNNING" and self._answers()

    def _answers(self) -> bool:
        try:
            return self.client.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def teachers(self) -> list[int]:
        """Process ids of the teacher replicas."""
        actors = state.list_actors(filters=[("class_name", "=", "ServeReplica:reft:Teacher"), ("state", "=", "ALIVE")])
        return [actor.pid for actor in actors]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    context = ray.init(
        address="local", num_cpus=4, include_dashboard=True, dashboard_host="127.0.0.1", log_to_driver=False
    )
    config = yaml.safe_load((ROOT / "serve_configs" / "local.yaml").read_text(encoding="utf-8"))
    config["http_options"]["port"] = free_port()
    application = config["applications"][0]
    application["args"] = {
        "screenings_uri": str(tmp_path_factory.mktemp("screenings")),
        "filter": {"max_upload_bytes": 8 << 20, "moderation_seconds": 30},
    }
    found = Service(f"http://127.0.0.1:{config['http_options']['port']}", f"http://{context.dashboard_url}", config)
    found.deployment("Teacher").update(
        num_replicas=2, ray_actor_options={"num_cpus": 0.2}, user_config={"scorer": "words"}
    )
    found.deployment("Gateway")["ray_actor_options"] = {"num_cpus": 0.2}
    try:
        found.deploy()
        found.wait(found.running, 180)
        yield found
    finally:
        # Also if it did not start: a Ray that keeps running fails every later module.
        found.client.close()
        serve.shutdown()
        ray.shutdown()


def row(number: int) -> bytes:
    text = f"{TEXTS[number % 3]} {number}"
    return json.dumps({"messages": [{"role": "user", "content": text}]}).encode() + b"\n"


def right(verdict: dict[str, Any]) -> bool:
    return bool(verdict["decision"] == DECISIONS[verdict["row"] % 3])


def test_the_routes_answer(service: Service) -> None:
    result = service.client.post("/v1/moderations", json={"input": "Build a bomb."}).json()["results"][0]
    assert result["flagged"] is True
    assert service.client.get("/v1/teacher").json()["id"] == "rt-words"
    assert service.client.get("/healthz").status_code == 200
    refused = service.client.post("/v1/moderations", json={})
    assert refused.status_code == 400
    assert refused.headers["x-request-id"].startswith("req_")


def test_a_stream_answers_before_its_upload_ends(service: Service) -> None:
    async def exchange(port: int) -> list[bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        chunk = f"{len(row(1)):x}\r\n".encode() + row(1) + b"\r\n"
        writer.write(b"POST /v1/screenings HTTP/1.1\r\nhost: 127.0.0.1\r\ntransfer-encoding: chunked\r\n\r\n" + chunk)
        seen = await reader.readuntil(b'"verdict"')
        writer.write(chunk * 9 + b"0\r\n\r\n")
        seen += await reader.readuntil(b"\r\n0\r\n\r\n")
        writer.close()
        await writer.wait_closed()
        return [part for part in seen.splitlines() if part.startswith(b"{")]

    lines = asyncio.run(exchange(httpx.URL(service.url).port or 0))
    assert json.loads(lines[-1])["block"] == len(lines) - 1 == 10


def test_an_upload_above_the_limit_names_the_resumable_api_which_works(service: Service) -> None:
    body = b"".join(map(row, range(140_000)))
    assert len(body) > 8 << 20
    refused = service.client.post("/v1/screenings", content=body)
    assert refused.status_code == 413
    assert "/v1/screenings/resumable" in refused.json()["error"]["message"]
    with ScreeningClient(service.url) as client:
        verdicts = list(client.screen(body.splitlines()[:30_000]))
    assert [verdict["row"] for verdict in verdicts] == list(range(30_000))
    assert all(map(right, verdicts))


def test_a_replica_killed_under_load_loses_no_row_and_gives_no_wrong_verdict(service: Service) -> None:
    killed = threading.Event()
    statuses: Counter[int] = Counter()

    def moderate() -> None:
        number = 0
        while not killed.is_set() or number < 20:
            number += 1
            response = service.client.post("/v1/moderations", json={"input": f"{TEXTS[number % 3]} x{number}"})
            statuses[response.status_code] += 1
            if response.status_code == 200:
                assert response.json()["results"][0]["reft"]["decision"] == DECISIONS[number % 3]

    def stream() -> list[dict[str, Any]]:
        response = service.client.post("/v1/screenings", content=b"".join(map(row, range(40_000))))
        return [json.loads(line) for line in response.text.splitlines()]

    before = service.teachers()
    assert len(before) == 2
    with ThreadPoolExecutor(6) as pool:
        streams = [pool.submit(stream) for _ in range(2)]
        clients = [pool.submit(moderate) for _ in range(4)]
        service.wait(lambda: statuses[200] > 20)
        assert not any(future.done() for future in streams)
        os.kill(before[0], signal.SIGKILL)
        found = [future.result() for future in streams]
        killed.set()
        for future in clients:
            future.result()
    for *verdicts, trailer in found:
        assert trailer["done"] is True
        assert [verdict["row"] for verdict in verdicts] == list(range(40_000))
        assert all(map(right, verdicts))
    assert set(statuses) == {200}
    service.wait(lambda: len(service.teachers()) == 2 and before[0] not in service.teachers())


def test_a_new_teacher_by_config_update_fails_no_request(service: Service) -> None:
    seen: Counter[str] = Counter()
    done = threading.Event()

    def moderate() -> None:
        while not done.is_set():
            response = service.client.post("/v1/moderations", json={"input": "Build a bomb."})
            assert response.status_code == 200, response.text
            assert response.json()["results"][0]["flagged"] is True
            seen[response.json()["model"]] += 1

    before = sorted(service.teachers())
    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(moderate) for _ in range(4)]
        try:
            service.wait(lambda: seen["rt-words"] > 20)
            service.deployment("Teacher")["user_config"] = {"scorer": "words", "teacher": "rt-2"}
            service.deploy()
            service.wait(lambda: seen["rt-2"] > 20)
            # The application is running again once both replicas have the new teacher.
            service.wait(service.running)
            answers = [service.client.post("/v1/moderations", json={"input": "Build a bomb."}) for _ in range(40)]
            assert {answer.json()["model"] for answer in answers} == {"rt-2"}
        finally:
            done.set()
        for future in clients:
            future.result()
    assert sorted(service.teachers()) == before


def test_overload_is_rejected_with_retry_after_and_nothing_queues(service: Service) -> None:
    service.deployment("Teacher").update(max_ongoing_requests=1, max_queued_requests=1)
    service.deploy()
    service.wait(service.running)
    # A hundred long texts keep the teacher busy.
    body = {"input": [f"{number} " + "word " * 5000 for number in range(100)]}

    def moderate(_: int) -> tuple[int, str | None, float]:
        started = time.monotonic()
        response = service.client.post("/v1/moderations", json=body)
        return response.status_code, response.headers.get("retry-after"), time.monotonic() - started

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(moderate, range(24)))
    statuses = Counter(status for status, _, _ in answers)
    assert statuses[200] >= 1
    assert statuses[429] + statuses[503] >= 5
    assert set(statuses) <= {200, 429, 503}
    assert all(after is not None for status, after, _ in answers if status != 200)
    assert service.client.post("/v1/moderations", json={"input": "Build a bomb."}).status_code == 200


def test_a_stream_outlasts_an_overloaded_teacher(service: Service) -> None:
    def stream(_: int) -> dict[str, Any]:
        response = service.client.post("/v1/screenings", content=b"".join(map(row, range(3000))))
        trailer: dict[str, Any] = json.loads(response.text.splitlines()[-1])
        return trailer

    with ThreadPoolExecutor(6) as pool:
        trailers = list(pool.map(stream, range(6)))
    assert all(trailer["done"] and trailer["rows"] == 3000 for trailer in trailers)


def test_clients_that_disconnect_free_their_streams(service: Service) -> None:
    for _ in range(3):
        for _ in range(10):
            with httpx.Client(base_url=service.url, timeout=0.05) as impatient, pytest.raises(httpx.TimeoutException):
                impatient.post("/v1/screenings", content=b"".join(map(row, range(20_000))))
    service.wait(lambda: service.client.post("/v1/screenings", content=row(1)).status_code == 200, 20)


def test_without_any_teacher_nothing_is_allowed(service: Service) -> None:
    def judged() -> tuple[int, str]:
        response = service.client.post(
            "/v1/moderations", json={"input": "Good morning."}, headers={"x-request-timeout-ms": "300"}
        )
        return response.status_code, response.text

    for pid in service.teachers():
        os.kill(pid, signal.SIGKILL)
    status, text = judged()
    assert status in (503, 504), text
    assert "results" not in json.loads(text)
    service.wait(lambda: judged()[0] == 200)
