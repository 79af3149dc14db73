"""Which tests run where; the fixtures that several packages share are in `fixtures/`."""

from __future__ import annotations

import functools
import gc
import os
import shutil
import ssl
from collections.abc import Generator
from pathlib import Path
from typing import Any

import httpcore2
import pytest

# A quarter of the time of collecting is garbage collection, which finds nothing among modules.
_USUAL_COLLECTION = gc.get_threshold()
gc.disable()
# One thread per process: tiny models are fastest so, sums are reproducible, and tests run in parallel anyway.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# On a machine that does other work Ray's processes take longer to start than the 30 s that they are given. A raylet
# ends by itself where an agent takes over 15 s, which cannot be configured: ray-project/ray#65983.
os.environ.setdefault("RAY_raylet_start_wait_time_s", "60")
os.environ.setdefault("RAY_agent_register_timeout_ms", "270000")
os.environ.setdefault("RAY_worker_register_timeout_seconds", "270")
# Ray's workers have a niceness of 15: beside one busy process on their core they take minutes to import what they run.
os.environ.setdefault("RAY_worker_niceness", "0")
# Each HTTP client reads 120 certificates of authorities, which takes longer than most tests. No test connects to one of
# theirs, so all clients of a process share what the first has read.
_new_context = ssl.create_default_context


@functools.cache
def _context_of(bundle: str) -> ssl.SSLContext:
    return _new_context(cafile=bundle)


def _shared_context(*purpose: ssl.Purpose, **files: Any) -> ssl.SSLContext:
    usual = not purpose and files.keys() == {"cafile"}  # the usual bundle, or that of SSL_CERT_FILE
    return _context_of(files["cafile"]) if usual else _new_context(*purpose, **files)


ssl.create_default_context = _shared_context
# The openai client's HTTP client reads those of the system.
httpcore2.default_ssl_context = functools.cache(httpcore2.default_ssl_context)
MEMORY = Path("/dev/shm")
"""Where tests write: a commit of SQLite waits for a disk, and so do thousands of deleted files."""
if (
    MEMORY.is_dir()
    and os.access(MEMORY, os.W_OK)
    and shutil.disk_usage(MEMORY).free > 4 << 30
    and not os.statvfs(MEMORY).f_flag & os.ST_NOEXEC  # tests also write programs
):
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

pytest_plugins = [
    "fixtures.http",
    "fixtures.models",
    "fixtures.postgres",
    "fixtures.prometheus",
    "fixtures.ray_cluster",
    "fixtures.review_service",
]

SHARED = Path(__file__).resolve().parents[2] / "shared"
_PROGRAMS = {
    "watching",
    "prometheus",
    "promtool",
    "postgres_url",
    "new_postgres",
    "manifests",
    "all_documents",
    "all_pods",
    "overlay",
    "net",
}
"""Fixtures that start a server or run a program from PATH."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests that need servers in their lane, and skip those whose rows the repository does not carry."""
    skip = pytest.mark.skip(reason=f"real rows are absent: no {SHARED}")
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if fixtures & _PROGRAMS:
            item.add_marker(pytest.mark.servers)
        if "shared_data" in fixtures and not SHARED.is_dir():
            item.add_marker(skip)
    # The others start a Ray of their own, which a process cannot have beside the shared one.
    items.sort(key=lambda item: "shared_ray" in getattr(item, "fixturenames", ()))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI, a test that was skipped because a program is not installed has failed."""
    report = yield
    if os.environ.get("CI") == "true" and report.skipped and "not installed" in str(report.longrepr):
        report.outcome = "failed"
    return report


def pytest_collection_finish() -> None:
    """Freeze what the imports made, so that the garbage collector does not walk through it during hundreds of tests."""
    gc.freeze()
    # Seldom: it was a sixth of the time of the service's tests.
    gc.set_threshold(20_000)
    gc.enable()


@pytest.fixture
def usual_collection() -> Generator[None]:
    """Garbage collection as often as in programs, for a test that measures memory."""
    seldom = gc.get_threshold()
    gc.set_threshold(*_USUAL_COLLECTION)
    yield
    gc.set_threshold(*seldom)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real public rows and a small pretrained base, in a directory next to the checkout."""
    return SHARED
