"""`serve_configs/local.yaml` with the two commands in its header and the built-in teacher."""

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "serve_configs" / "local.yaml"
READY_SECONDS = 180


def command(line: str) -> tuple[list[str], dict[str, str]]:
    """A shell line's arguments and environment, with this environment's programs first."""
    words = shlex.split(line)
    settings = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return [word for word in words if word.partition("=")[0] not in settings], {**os.environ, **settings, "PATH": path}


@pytest.fixture(scope="module")
def short_folder() -> Iterator[str]:
    """Ray's directory for sockets and the cluster's address, separate from that of later tests."""
    with tempfile.TemporaryDirectory(prefix="ry-", ignore_cleanup_errors=True) as short:
        yield short


@pytest.fixture(scope="module")
def address(short_folder: str) -> Iterator[str]:
    """The service's address, once it is ready."""
    start, deploy = re.findall(r"^#\s+(RAY_AUTH_MODE=.*)$", CONFIG.read_text(), re.M)
    words, environment = command(start)
    # Blocking, so that stopping it stops only this cluster.
    environment["RAY_TMPDIR"] = short_folder
    node = subprocess.Popen([*words, "--block"], env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
    http = yaml.safe_load(CONFIG.read_text())["http_options"]
    url = f"http://{http['host']}:{http['port']}"
    try:
        words, environment = command(deploy)
        until = time.monotonic() + READY_SECONDS
        while subprocess.run(words, env=environment, cwd=ROOT, capture_output=True).returncode:
            assert node.poll() is None, "the node has ended"
            assert time.monotonic() < until, "no dashboard takes the config"
        while not ready(url):
            assert time.monotonic() < until, "the service does not get ready"
            time.sleep(0.2)
        yield url
    finally:
        node.terminate()
        node.wait(60)


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False


def test_its_canary_pair_is_judged_correctly(address: str) -> None:
    deployments = yaml.safe_load(CONFIG.read_text())["applications"][0]["deployments"]
    canary = next(item for item in deployments if item["name"] == "Teacher")["user_config"]["canary"]
    texts = [canary["harmful"], canary["harmless"]]
    answer = httpx.post(f"{address}/v1/moderations", json={"input": texts}, timeout=30)
    assert [result["flagged"] for result in answer.json()["results"]] == [True, False]


def test_a_dataset_streams_through_it(address: str) -> None:
    row = '{"messages": [{"role": "user", "content": "How do I bake bread?"}]}\n'
    answer = httpx.post(f"{address}/v1/screenings", content=row * 20, timeout=30)
    assert answer.status_code == 200
    assert len(answer.text.splitlines()) == 21  # and the trailer


@pytest.mark.parametrize("start", ["ensure_training_ray", "ensure_ray"])
def test_a_command_next_to_it_starts_a_separate_ray(address: str, short_folder: str, start: str) -> None:
    """Without an address Ray joins the cluster that it finds on the machine, and rejects `num_cpus`."""
    code = f"from reft_ray.local_ray import {start}; {start}()"
    assert (Path(short_folder) / "ray" / "ray_current_cluster").is_file()
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["RAY_TMPDIR"] = short_folder
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
