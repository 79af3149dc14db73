"""A cluster that a command starts answers to its token only, unless its user chose otherwise."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

CLUSTER = """
import json, os, sys
import ray  # reads RAY_AUTH_MODE before the token is made
from reft_ray.local_ray import ensure_ray
ensure_ray(1)
address = ray.get_runtime_context().gcs_address
print(json.dumps([address, {k: v for k, v in os.environ.items() if k.startswith("RAY_AUTH")}]), flush=True)
sys.stdin.read()
"""

CLIENT = """
import ray, sys, typer
from reft_ray.cli.common import user_errors
from reft_ray.local_ray import join_ray
try:
    with user_errors():
        join_ray()
except typer.Exit as end:
    sys.exit(end.exit_code)
print(ray.get(ray.remote(num_cpus=0)(lambda: "joined").remote()))
"""


def environment(home: Path, **settings: str) -> dict[str, str]:
    """Without any token: not in the variables, not in the home directory."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "HOME": str(home), **settings}


def started(environment: dict[str, str]) -> tuple[subprocess.Popen[str], Any]:
    """A process with a Ray of its own, and the line that it wrote."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    return process, json.loads(line)


@contextmanager
def cluster(home: Path, **settings: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Address and RAY_AUTH variables of a Ray of one's own, in another process."""
    with tempfile.TemporaryDirectory(prefix="ry-", ignore_cleanup_errors=True) as short:
        process, (address, variables) = started(environment(home, RAY_TMPDIR=short, **settings))
        try:
            yield address, variables
        finally:
            _, errors = process.communicate()
        assert "authentication" not in errors.lower(), errors


def client(home: Path, address: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CLIENT],
        env=environment(home, RAY_ADDRESS=address, **settings),
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_only_its_token_opens_a_cluster_of_ones_own(tmp_path: Path) -> None:
    with cluster(tmp_path) as (address, variables):
        token = Path(variables["RAY_AUTH_TOKEN_PATH"])
        assert variables["RAY_AUTH_MODE"] == "token"
        assert [path.stat().st_mode & 0o777 for path in (token, token.parent)] == [0o600, 0o700]
        assert len(token.read_text()) == 64
        for wrong in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}, {"RAY_AUTH_MODE": "token"}):
            refused = client(tmp_path, address, **wrong)
            assert refused.returncode == 1
            assert "joined" not in refused.stdout
            assert "error: Ray does not answer, or RAY_AUTH_MODE=token" in refused.stderr
            assert "Traceback" not in refused.stderr
        right = client(tmp_path, address, **variables)
        assert right.stdout == "joined\n", right.stderr
    assert not token.parent.exists()
    assert not (tmp_path / ".ray").exists()


@pytest.mark.parametrize(
    "chosen", [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}]
)
def test_what_the_user_chose_is_kept(tmp_path: Path, chosen: dict[str, str]) -> None:
    with cluster(tmp_path, **chosen) as (address, variables):
        assert variables == chosen
        assert client(tmp_path, address, **chosen).stdout == "joined\n"


def test_a_late_ray_leaves_no_process_and_the_next_start_works(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import psutil
    import ray
    from ray._private import services

    from reft_ray.local_ray import start_own_ray

    found, first = services.get_node, []

    def late(*node: object) -> object:
        if not first:
            first.extend(child for child in psutil.Process().children() if child.name() in ("gcs_server", "raylet"))
            raise Exception("The current node timed out during startup.")  # as Ray raises it
        return found(*node)

    monkeypatch.setattr(services, "get_node", late)
    start_own_ray(1, _node_ip_address="127.0.0.1", object_store_memory=256 << 20)
    try:
        assert ray.get(ray.remote(num_cpus=0)(lambda: "up").remote()) == "up"
        assert len(first) == 2
        # They were killed, which takes a busy machine a moment.
        assert psutil.wait_procs(first, timeout=60)[1] == []
        named = re.search(r"log of its raylet: (\S+)", caplog.text)
        assert named
        assert Path(named[1]).is_file()
    finally:
        ray.shutdown()
