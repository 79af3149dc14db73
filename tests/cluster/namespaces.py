"""Several hosts on one machine as network namespaces.

Each host has its own /tmp; the shared storage is one directory that all hosts mount.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from fixtures.postgres import postgres_binaries

REDIS_PASSWORD = "reft"
RAY_START = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--object-store-memory=100000000",
             "--disable-usage-stats"]  # fmt: skip
QUICK = {
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
"""The environment of Ray on a host, which notices a lost one in seconds."""


class Net:
    """A bridge with hosts. The network is 10.203.N.0/24; the test has address 1."""

    def __init__(self, scratch: Path) -> None:
        number = os.getpid() % 250
        self.name, self.prefix = f"rt{number}", f"10.203.{number}"
        self.scratch = scratch
        self._hosts: list[str] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        run("ip", "link", "add", self.name, "type", "bridge")
        run("ip", "addr", "add", f"{self.prefix}.1/24", "dev", self.name)
        run("ip", "link", "set", self.name, "up")

    def address(self, host: int) -> str:
        return f"{self.prefix}.{10 + host}"

    def add(self, host: int) -> None:
        space, cable = f"{self.name}h{host}", f"{self.name}v{host}"
        run("ip", "netns", "add", space)
        self._hosts.append(space)
        run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
        run("ip", "link", "set", cable, "master", self.name, "up")
        for device, address in (("lo", None), ("eth0", f"{self.address(host)}/24")):
            if address:
                run("ip", "-n", space, "addr", "add", address, "dev", device)
            run("ip", "-n", space, "link", "set", device, "up")
        # Ray finds the host's address from its default route.
        run("ip", "-n", space, "route", "add", "default", "via", f"{self.prefix}.1")

    def cut(self, host: int) -> None:
        run("ip", "link", "set", f"{self.name}v{host}", "down")

    def start(
        self, host: int, *command: str, unshare: Sequence[str] = (), **environment: str
    ) -> subprocess.Popen[bytes]:
        """Start a process on a host with the /tmp of that host; its output goes to a file."""
        tmp = self.scratch / f"tmp{host}"
        tmp.mkdir(exist_ok=True)
        log = (self.scratch / f"host{host}-{len(self._processes)}.log").open("wb")
        script = f'mount --bind "{tmp}" /tmp && exec "$@"'
        process = subprocess.Popen(
            ["ip", "netns", "exec", f"{self.name}h{host}", "unshare", "--mount", *unshare,
             "bash", "-c", script, "_", *command],
            env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._processes.append(process)
        log.close()
        return process

    def redis(self, host: int) -> None:
        self.start(host, "redis-server", "--bind", self.address(host), "--requirepass", REDIS_PASSWORD, "--save", "")

    def head(self, host: int, store: int, *options: str, **environment: str) -> None:
        """Start a Ray head without CPUs; its state is in the store's Redis."""
        self.start(
            host, *RAY_START, "--head", f"--node-ip-address={self.address(host)}", "--port=6379", "--num-cpus=0",
            f"--redis-password={REDIS_PASSWORD}", *options,
            **QUICK, **environment, RAY_REDIS_ADDRESS=f"{self.address(store)}:6379",
            RAY_REDIS_PASSWORD=REDIS_PASSWORD, RAY_external_storage_namespace="reft",
        )  # fmt: skip

    def worker(self, host: int, head: int, cpus: int, **environment: str) -> None:
        """Start a Ray worker node. It has process ids of its own: a driver on it looks for its raylet among all."""
        joined = f"--address={self.address(head)}:6379"
        self.start(
            host, *RAY_START, joined, f"--node-ip-address={self.address(host)}", f"--num-cpus={cpus}",
            unshare=("--pid", "--fork", "--kill-child", "--mount-proc"), **QUICK, **environment,
        )  # fmt: skip

    def await_worker(self, host: int) -> None:
        """Wait until the node of a host answers."""
        wait_until(lambda: answers(f"http://{self.address(host)}:52365/api/local_raylet_healthz"), 90)

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


@contextmanager
def network() -> Iterator[Net]:
    """A network, which is removed with all that runs on its hosts; the test is skipped where there can be none."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command `ip`")
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")
    # Socket paths are limited to 107 bytes; pytest's directories are longer.
    scratch = Path(f"/var/tmp/rt{os.getpid()}")
    # PostgreSQL, which does not run as root, has a directory in it.
    scratch.mkdir(mode=0o711)
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


@contextmanager
def postgres(net: Net, host: int) -> Iterator[str]:
    """A PostgreSQL server on a host; the URL of its database."""
    binaries = postgres_binaries()
    if binaries is None:
        pytest.skip("a PostgreSQL server is not installed (apt-get install postgresql)")
    root = net.scratch / "pg"
    root.mkdir()
    shutil.chown(root, "postgres", "postgres")
    # Unlike runuser it becomes the server, which then gets our signal.
    as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    data = root / "data"
    subprocess.run(
        [*as_user, binaries / "initdb", "-D", data, "-A", "trust", "-U", "reft", "--no-sync"],
        check=True, cwd="/", stdout=subprocess.DEVNULL,
    )  # fmt: skip
    with (data / "pg_hba.conf").open("a") as rules:
        rules.write(f"host all all {net.prefix}.0/24 trust\n")
    server = net.start(
        host, *as_user, str(binaries / "postgres"), "-D", str(data), "-k", str(root),
        "-c", f"listen_addresses={net.address(host)}", "-c", "fsync=off", "-c", "dynamic_shared_memory_type=mmap",
    )  # fmt: skip

    def created() -> bool:
        asked = [binaries / "createdb", "-h", net.address(host), "-U", "reft", "reft"]
        return subprocess.run(asked, capture_output=True).returncode == 0

    wait_until(created, 60, server, net)
    try:
        yield f"postgresql+psycopg://reft@{net.address(host)}/reft"
    finally:
        # A killed server would leave shared memory.
        server.send_signal(signal.SIGQUIT)
        server.wait(timeout=20)


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def wait_until(
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


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=3).status_code == 200
    except httpx.HTTPError:
        return False


def has_dashboard(net: Net, head: int) -> bool:
    """Whether the dashboard, which listens on loopback, accepts connections."""
    asked = subprocess.run(
        ["ip", "netns", "exec", f"{net.name}h{head}", "bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/8265"],
        capture_output=True, timeout=10,
    )  # fmt: skip
    return asked.returncode == 0
