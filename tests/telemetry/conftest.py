"""Fixtures: a process with metrics, and the Prometheus that scrapes it."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


@dataclass
class Service:
    """A running process with the protocol of synthetic_service.py."""

    process: subprocess.Popen[str]
    targets: dict[str, str]

    def record(self) -> dict[str, list[dict[str, Any]]]:
        """Record another round; return the ledger of all rounds by scrape job."""
        assert self.process.stdin is not None
        self.process.stdin.write("record\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the service exited with {self.process.wait()}"
        return json.loads(line)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """The synthetic service."""
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
def prometheus(service: Service, watching: Callable[..., AbstractContextManager[Any]]) -> Iterator[Any]:
    """A Prometheus that scrapes the service every second and evaluates the rules."""
    with watching(service.targets) as running:
        yield running
