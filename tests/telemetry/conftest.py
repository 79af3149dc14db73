"""A real Prometheus on loopback, and the process that it watches."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from reft_ray.telemetry import rules

HERE = Path(__file__).parent


@dataclass
class Prometheus:
    """The HTTP API of a running Prometheus."""

    url: str
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=30))

    def get(self, path: str, **params: str) -> Any:
        """The `data` of an API answer; fails the test with Prometheus' own words."""
        answer = self.client.get(f"{self.url}/api/v1/{path}", params=params)
        document = answer.json()
        assert document["status"] == "success", f"{params}: {document}"
        return document["data"]

    def query(self, expr: str) -> list[tuple[dict[str, str], float]]:
        """An instant query: labels and value of each series."""
        return [(series["metric"], float(series["value"][1])) for series in self.get("query", query=expr)["result"]]

    def wait(self, what: str, holds: Callable[[], bool], seconds: float = 90) -> None:
        """Ask until `holds`; what Prometheus has scraped or computed gives no event to await."""
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, f"Prometheus has not {what} after {seconds} s"
            time.sleep(0.5)


@dataclass
class Service:
    """A running process that speaks the protocol of synthetic_service.py."""

    process: subprocess.Popen[str]
    targets: dict[str, str]

    def record(self) -> dict[str, list[dict[str, Any]]]:
        """One more round; the ledger of all rounds so far, by scrape job."""
        assert self.process.stdin is not None
        self.process.stdin.write("record\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the service ended with {self.process.wait()}"
        return json.loads(line)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """The synthetic service; point it at another script of the same protocol to watch a real one."""
    with tempfile.TemporaryDirectory(prefix="ry-", ignore_cleanup_errors=True) as short:
        process = subprocess.Popen(
            [sys.executable, str(HERE / "synthetic_service.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=HERE.parents[1],
            env={
                **os.environ,
                "PYTHONPATH": str(HERE.parents[1]),
                "RAY_AUTH_MODE": "disabled",
                "RAY_TMPDIR": short,
                "OMP_NUM_THREADS": "1",
            },
        )
        try:
            running = Service(process, {})
            running.targets = running._read()["targets"]
            yield running
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


@pytest.fixture(scope="module")
def prometheus(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that scrapes the service every second and evaluates our rules."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed (apt: prometheus)")
    home = tmp_path_factory.mktemp("prometheus")
    rules.write(home)
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "2s"},
        "rule_files": [str(home / rules.FILE)],
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": [target]}]} for job, target in service.targets.items()
        ],
    }
    (home / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (home / "log").open("w") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={home / 'prometheus.yml'}",
                f"--storage.tsdb.path={home / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    running = Prometheus(f"http://127.0.0.1:{port}")
    try:
        running.wait("started", lambda: _ready(running, process, home / "log"))
        yield running
    finally:
        running.client.close()
        process.terminate()
        process.wait(30)


def _ready(running: Prometheus, process: subprocess.Popen[bytes], log: Path) -> bool:
    assert process.poll() is None, log.read_text()
    try:
        return running.client.get(f"{running.url}/-/ready").status_code == 200
    except httpx.ConnectError:
        return False
