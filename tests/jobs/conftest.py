"""A database of each kind, a manual clock, and a content store in a temporary directory."""

import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

from reft_ray.jobs.content import ContentStore
from reft_ray.jobs.database import Database
from reft_ray.jobs.files import FileStore
from reft_ray.jobs.job import JobSpec
from reft_ray.jobs.job_store import JobStore


class Clock:
    """Seconds since the epoch, moved by hand."""

    def __init__(self) -> None:
        self.time = 1_800_000_000.0

    def __call__(self) -> float:
        return self.time

    def advance(self, seconds: float) -> None:
        self.time += seconds


def postgres_binaries() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def postgres_url():
    """A temporary PostgreSQL server; it refuses to run as root, so it then runs as Debian's user."""
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    binaries = postgres_binaries()
    if binaries is None:
        pytest.skip("a PostgreSQL server is not installed (apt-get install postgresql)")
    if os.geteuid() == 0 and shutil.which("runuser") is None:
        pytest.skip("PostgreSQL does not run as root, and there is no runuser")
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    root = Path(tempfile.mkdtemp(prefix="reft-pg-", dir="/tmp"))
    if as_user:
        shutil.chown(root, "postgres")
    port = free_port()
    data = root / "data"
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "cwd": "/"}
    subprocess.run([*as_user, binaries / "initdb", "-D", data, "-A", "trust", "-U", "reft", "--no-sync"], **quiet)
    options = f"-p {port} -k {root} -c listen_addresses=127.0.0.1 -c fsync=off"
    control = [*as_user, binaries / "pg_ctl", "-D", data, "-w"]
    subprocess.run([*control, "-l", root / "log", "-o", options, "start"], **quiet)
    url = f"postgresql+psycopg://reft@127.0.0.1:{port}"
    try:
        import psycopg

        with psycopg.connect(url.replace("+psycopg", "") + "/postgres", autocommit=True) as connection:
            connection.execute("CREATE DATABASE migrated")
        Database.open(f"{url}/migrated").close()
        yield url
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], **quiet)
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.servers)])
def database(request, tmp_path, clock):
    """The same contract on both databases."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'jobs.db'}"
    else:
        server = request.getfixturevalue("postgres_url")
        name = f"t{os.urandom(6).hex()}"
        import psycopg

        with psycopg.connect(server.replace("+psycopg", "") + "/postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE migrated")
        url = f"{server}/{name}"
    database = Database.open(url, clock)
    yield database
    database.close()


@pytest.fixture
def sqlite_database(tmp_path, clock):
    database = Database.open(f"sqlite:///{tmp_path / 'jobs.db'}", clock)
    yield database
    database.close()


@pytest.fixture
def content(tmp_path) -> ContentStore:
    return ContentStore(str(tmp_path / "content"))


@pytest.fixture
def jobs(database) -> JobStore:
    return JobStore(database)


@pytest.fixture
def files(database, content) -> FileStore:
    return FileStore(database, content)


@pytest.fixture
def spec() -> JobSpec:
    return JobSpec(model="tiny", training_file="file-1", seed=7)
