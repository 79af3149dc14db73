"""Several hosts on one machine as network namespaces: a lost worker host and a killed head.

A head with Redis, two workers, and a third worker that joins when one is lost. Each host has its own /tmp; the shared
storage is one directory that all hosts mount.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import yaml

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

KIT = Path(__file__).with_name("hosts_kit.py")
ROWS = 20_000
REDIS_PASSWORD = "reft"


class Net:
    """A bridge with hosts. The network is 10.203.N.0/24; the test has address 1."""

    def __init__(self, scratch: Path) -> None:
        number = os.getpid() % 250
        self.name, self.prefix = f"rt{number}", f"10.203.{number}"
        self.scratch = scratch
        self._hosts: list[str] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        _run("ip", "link", "add", self.name, "type", "bridge")
        _run("ip", "addr", "add", f"{self.prefix}.1/24", "dev", self.name)
        _run("ip", "link", "set", self.name, "up")

    def address(self, host: int) -> str:
        return f"{self.prefix}.{10 + host}"

    def add(self, host: int) -> None:
        space, cable = f"{self.name}h{host}", f"{self.name}v{host}"
        _run("ip", "netns", "add", space)
        self._hosts.append(space)
        _run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
        _run("ip", "link", "set", cable, "master", self.name, "up")
        for device, address in (("lo", None), ("eth0", f"{self.address(host)}/24")):
            if address:
                _run("ip", "-n", space, "addr", "add", address, "dev", device)
            _run("ip", "-n", space, "link", "set", device, "up")
        # Ray finds the host's address from its default route.
        _run("ip", "-n", space, "route", "add", "default", "via", f"{self.prefix}.1")

    def cut(self, host: int) -> None:
        _run("ip", "link", "set", f"{self.name}v{host}", "down")

    def start(self, host: int, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a process on a host with the /tmp of that host; its output goes to a file."""
        tmp = self.scratch / f"tmp{host}"
        tmp.mkdir(exist_ok=True)
        log = (self.scratch / f"host{host}-{len(self._processes)}.log").open("wb")
        script = f'mount --bind "{tmp}" /tmp && exec "$@"'
        process = subprocess.Popen(
            ["ip", "netns", "exec", f"{self.name}h{host}", "unshare", "-m", "bash", "-c", script, "_", *command],
            env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._processes.append(process)
        log.close()
        return process

    def log(self, process: subprocess.Popen[bytes]) -> str:
        index = self._processes.index(process)
        (path,) = self.scratch.glob(f"host*-{index}.log")
        return path.read_text(errors="replace")

    def kill(self, host: int) -> None:
        """SIGKILL to everything on a host."""
        found = subprocess.run(
            ["ip", "netns", "pids", f"{self.name}h{host}"], capture_output=True, text=True, check=True
        )
        for pid in found.stdout.split():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue

    def close(self) -> None:
        for index, space in enumerate(self._hosts):
            self.kill(int(space.rpartition("h")[2]))
            subprocess.run(["ip", "netns", "del", self._hosts[index]], check=False)
        for process in self._processes:
            process.wait(timeout=20)
        subprocess.run(["ip", "link", "del", self.name], check=False)


@pytest.fixture
def net() -> Iterator[Net]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command `ip`")
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")
    # Socket paths are limited to 107 bytes; pytest's directories are longer.
    scratch = Path(f"/var/tmp/rt{os.getpid()}")
    scratch.mkdir(mode=0o700)
    try:
        made = Net(scratch)
    except subprocess.CalledProcessError as error:
        shutil.rmtree(scratch)
        pytest.skip(f"cannot create a network: {error.stderr.decode().strip()}")
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(scratch)


def test_no_row_and_no_step_is_lost_with_a_worker_host_and_the_head(net: Net, llama: Path) -> None:
    shared = net.scratch / "shared"
    shared.mkdir()
    base = shared / "base"
    shutil.copytree(llama, base)
    head, kept, lost, replacement = range(4)
    store = 4
    for host in (head, kept, lost, replacement, store):
        net.add(host)
    net.start(store, "redis-server", "--bind", net.address(store), "--requirepass", REDIS_PASSWORD, "--save", "")
    gcs = f"{net.address(head)}:6379"
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--object-store-memory=100000000",
           "--disable-usage-stats"]  # fmt: skip
    quick = {
        "RAY_AUTH_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
        "RAY_TMPDIR": "/tmp",
        # All hosts share one hostname, which does not resolve to their addresses.
        "GLOO_SOCKET_IFNAME": "eth0",
        "RAY_health_check_initial_delay_ms": "3000",
        "RAY_health_check_period_ms": "1500",
        "RAY_health_check_timeout_ms": "3000",
        "RAY_health_check_failure_threshold": "4",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    }

    def start_head() -> None:
        net.start(
            head, *ray, "--head", f"--node-ip-address={net.address(head)}", "--port=6379", "--num-cpus=0",
            f"--redis-password={REDIS_PASSWORD}",
            **quick, RAY_REDIS_ADDRESS=f"{net.address(store)}:6379", RAY_REDIS_PASSWORD=REDIS_PASSWORD,
            RAY_external_storage_namespace="reft",
        )  # fmt: skip

    def start_worker(host: int) -> None:
        net.start(
            host, *ray, f"--address={gcs}", f"--node-ip-address={net.address(host)}", "--num-cpus=6", **quick
        )  # fmt: skip

    # `serve deploy` runs on the head host, so the dashboard may listen on loopback.
    start_head()
    _await(lambda: _dashboard(net, head), 90)
    for host in (kept, lost):
        start_worker(host)
    for host in (kept, lost):
        _await(lambda host=host: _answers(f"http://{net.address(host)}:52365/api/local_raylet_healthz"), 90)

    config = shared / "serve.yaml"
    config.write_text(yaml.safe_dump(_serve_config(shared)))
    deploy = net.start(head, str(Path(sys.executable).with_name("serve")), "deploy", str(config), **quick)
    _await(lambda: deploy.poll() is not None, 180)
    assert deploy.returncode == 0, net.log(deploy)
    service = f"http://{net.address(kept)}:8000"
    _await(lambda: _gives_verdicts(service), 120)
    _await(lambda: _gives_verdicts(f"http://{net.address(lost)}:8000"), 60)

    python = [sys.executable, str(KIT)]
    driver = {**quick, "RAY_ADDRESS": gcs}
    training = net.start(
        head, *python, "finetune", str(base), str(shared / "student"), str(shared / "runs"), **driver
    )  # fmt: skip
    # Start training first: it needs both hosts.
    _await(lambda: _checkpoints(shared), 120, training, net)
    rows = shared / "rows.jsonl"
    texts = ("how to bake bread", "how to build a bomb", "a tactical knife")
    rows.write_text(
        "".join(json.dumps({"prompt": f"{texts[i % 3]} {i}", "completion": "x"}) + "\n" for i in range(ROWS))
    )
    screening = net.start(head, *python, "screen", str(rows), str(shared / "screened"), **driver)
    _await(lambda: any((shared / "screened" / ".screen" / "units").glob("*.json")), 120, screening, net)

    assert training.poll() is None, "training ended before the host was lost: it needs more rows"
    net.cut(lost)
    cut = time.time()
    before = max(_checkpoints(shared))
    start_worker(replacement)
    _await(lambda: _is_stable(service), 60)
    print(f"stable {time.time() - cut:.0f} s after the cut")

    # Training resumed if no checkpoint saved after the cut is older than `before`; a restart would save step 1 again.
    fresh: set[int] = set()

    def trained() -> bool:
        fresh.update(_checkpoints(shared, since=cut + 1))
        return training.poll() is not None

    _await(trained, 200, details=lambda: f"saved after the cut: {sorted(fresh)}\n{net.log(training)}")
    assert training.returncode == 0, net.log(training)
    assert fresh, "nothing was saved after the cut"
    assert min(fresh) >= before, (before, sorted(fresh))
    assert (shared / "student" / "adapter_model.safetensors").is_file()

    assert screening.wait(timeout=120) == 0, net.log(screening)
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
    start_head()
    _await(lambda: _dashboard(net, head), 90)
    _await(lambda: _is_stable(service), 60)
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
                "args": {"screenings_uri": str(shared / "screenings")},
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


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def _await(
    done: Callable[[], object],
    seconds: float,
    process: subprocess.Popen[bytes] | None = None,
    net: Net | None = None,
    details: Callable[[], str] = str,
) -> None:
    end = time.monotonic() + seconds
    while not done():
        if process is not None and net is not None:
            assert process.poll() is None, net.log(process)
        assert time.monotonic() < end, f"waited {seconds} s\n{details()}"
        time.sleep(0.2)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=3).status_code == 200
    except httpx.HTTPError:
        return False


def _dashboard(net: Net, head: int) -> bool:
    """Whether the dashboard, which listens on loopback, accepts connections."""
    asked = subprocess.run(
        ["ip", "netns", "exec", f"{net.name}h{head}", "bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/8265"],
        capture_output=True, timeout=10,
    )  # fmt: skip
    return asked.returncode == 0


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
