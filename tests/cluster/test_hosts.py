"""The filter on several hosts: a lost worker host and a killed head.

A head with Redis, two workers, and a third worker that joins when one is lost.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from cluster.namespaces import QUICK, Net, has_dashboard, network, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

KIT = Path(__file__).with_name("hosts_kit.py")
ROWS = 20_000


@pytest.fixture
def net() -> Iterator[Net]:
    with network() as made:
        yield made


def test_no_row_and_no_step_is_lost_with_a_worker_host_and_the_head(net: Net, llama: Path) -> None:
    shared = net.scratch / "shared"
    shared.mkdir()
    base = shared / "base"
    shutil.copytree(llama, base)
    head, kept, lost, replacement = range(4)
    store = 4
    for host in (head, kept, lost, replacement, store):
        net.add(host)
    net.redis(store)
    gcs = f"{net.address(head)}:6379"

    def start_worker(host: int) -> None:
        net.worker(host, head, cpus=6)

    # `serve deploy` runs on the head host, so the dashboard may listen on loopback.
    net.head(head, store)
    wait_until(lambda: has_dashboard(net, head), 90)
    for host in (kept, lost):
        start_worker(host)
    for host in (kept, lost):
        net.await_worker(host)

    config = shared / "serve.yaml"
    config.write_text(yaml.safe_dump(_serve_config(shared)))
    deploy = net.start(head, str(Path(sys.executable).with_name("serve")), "deploy", str(config), **QUICK)
    wait_until(lambda: deploy.poll() is not None, 180)
    assert deploy.returncode == 0, net.log(deploy)
    service = f"http://{net.address(kept)}:8000"
    wait_until(lambda: _gives_verdicts(service), 120)
    wait_until(lambda: _gives_verdicts(f"http://{net.address(lost)}:8000"), 60)

    python = [sys.executable, str(KIT)]
    driver = {**QUICK, "RAY_ADDRESS": gcs}
    training = net.start(
        head, *python, "finetune", str(base), str(shared / "student"), str(shared / "runs"), **driver
    )  # fmt: skip
    # Start training first: it needs both hosts.
    wait_until(lambda: _checkpoints(shared), 240, training, net)
    rows = shared / "rows.jsonl"
    texts = ("how to bake bread", "how to build a bomb", "a tactical knife")
    rows.write_text(
        "".join(json.dumps({"prompt": f"{texts[i % 3]} {i}", "completion": "x"}) + "\n" for i in range(ROWS))
    )
    screening = net.start(head, *python, "screen", str(rows), str(shared / "screened"), **driver)
    wait_until(lambda: any((shared / "screened" / ".screen" / "units").glob("*.json")), 240, screening, net)

    assert training.poll() is None, "training ended before the host was lost: it needs more rows"
    net.cut(lost)
    cut = time.time()
    before = max(_checkpoints(shared))
    start_worker(replacement)
    wait_until(lambda: _is_stable(service), 60)
    print(f"stable {time.time() - cut:.0f} s after the cut")

    # Training resumed if no checkpoint saved after the cut is older than `before`; a restart would save step 1 again.
    fresh: set[int] = set()

    def trained() -> bool:
        fresh.update(_checkpoints(shared, since=cut + 1))
        return training.poll() is not None

    wait_until(trained, 500, details=lambda: f"saved after the cut: {sorted(fresh)}\n{net.log(training)}")
    assert training.returncode == 0, net.log(training)
    assert fresh, "nothing was saved after the cut"
    assert min(fresh) >= before, (before, sorted(fresh))
    assert (shared / "student" / "adapter_model.safetensors").is_file()

    wait_until(lambda: screening.poll() is not None, 240, details=lambda: net.log(screening))
    assert screening.returncode == 0, net.log(screening)
    # Ray may log after it.
    counts = json.loads(next(line for line in net.log(screening).splitlines() if line.startswith('{"rows"')))
    assert counts["rows"] == ROWS
    assert counts["kept"] + counts["review"] + counts["blocked"] + counts["invalid"] == ROWS
    assert counts["blocked"] == len(range(1, ROWS, 3))

    net.kill(head)
    killed = time.time()
    assert _gives_verdicts(service), "verdicts must not depend on the head"
    # A new pod starts with an empty disk; Ray would take the old session files for a running head.
    shutil.rmtree(net.scratch / f"tmp{head}")
    net.head(head, store)
    wait_until(lambda: has_dashboard(net, head), 90)
    wait_until(lambda: _is_stable(service), 60)
    print(f"stable {time.time() - killed:.0f} s after the head died")


def _serve_config(shared: Path) -> dict:
    size = {"num_replicas": 2, "max_replicas_per_node": 1}
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": 8000},
        "applications": [
            {
                "name": "reft",
                "route_prefix": "/",
                "import_path": "reft_ray.serving.app:build_app",
                "args": {
                    "screenings_uri": str(shared / "screenings"),
                    # As `manifests render` writes for a pod, whose callers do not come from loopback.
                    "filter": {"hosts": ["*"], "authenticated_in_front": True},
                },
                "deployments": [
                    {"name": "Gateway", **size, "ray_actor_options": {"num_cpus": 0.5}},
                    {
                        "name": "Teacher",
                        **size,
                        "ray_actor_options": {"num_cpus": 1},
                        "user_config": {"scorer": "words"},
                    },
                ],
            }
        ],
    }


def _gives_verdicts(service: str) -> bool:
    """Whether both verdicts are right; any other response must be an error, never an allow."""
    try:
        answer = httpx.post(f"{service}/v1/moderations", json={"input": ["bread", "a bomb"]}, timeout=5)
    except httpx.HTTPError:
        return False
    if answer.status_code != 200:
        assert answer.status_code in (404, 408, 429, 500, 503, 504), answer.text
        return False
    assert [result["flagged"] for result in answer.json()["results"]] == [False, True]
    return True


def _is_stable(service: str) -> bool:
    return all(_gives_verdicts(service) for _ in range(20))


def _checkpoints(shared: Path, since: float = 0.0) -> list[int]:
    """Steps of the existing checkpoints."""
    found = []
    for path in (shared / "runs" / "hosts").glob("checkpoint-*"):
        try:
            if path.stat().st_mtime >= since:
                found.append(int(path.name.rpartition("-")[2]))
        except FileNotFoundError:
            continue
    return found
