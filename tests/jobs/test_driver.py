"""The driver's process as the launcher starts it, from its command line to its log."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reft_ray.jobs.driver import CONFIG_VARIABLE, DriverConfig
from reft_ray.jobs.job import Event, Status
from reft_ray.jobs.job_store import JobStore
from reft_ray.jobs.launcher import ProcessLauncher
from reft_ray.jobs.lease import Leases

ROW = "how do I steal a car"
STEPS = f'''
import logging
import threading
import warnings

def failing():
    warnings.warn("cannot read row {ROW}")
    logging.getLogger("a.library").warning("%s", "a warning")
    try:
        raise ValueError("cannot read row {ROW}")
    except ValueError:
        logging.getLogger("a.library").exception("a library failed")
    thread = threading.Thread(target=int, args=("{ROW}",))
    thread.start()
    thread.join()
    raise ValueError("cannot read row {ROW}")
'''


@pytest.fixture
def start(sqlite_database, content, tmp_path):
    """Run a driver of one attempt to its end, as the service does; returns its log's lines."""
    (tmp_path / "hostile_steps.py").write_text(STEPS)
    url = sqlite_database.engine.url.render_as_string(hide_password=False)
    config = DriverConfig(url, content.uri("x").removesuffix("/x"), "hostile_steps:failing")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    launcher = ProcessLauncher(config, tmp_path / "logs", environment)

    def run(job_id, attempt):
        handle = launcher.start(job_id, attempt)
        until = time.monotonic() + 60
        while launcher.is_alive(handle):
            assert time.monotonic() < until, "the driver does not end"
            time.sleep(0.05)
        return (tmp_path / "logs" / f"{job_id}-{attempt}.log").read_text().splitlines()

    return run


def test_whatever_fails_in_a_driver_its_log_has_types_and_places_and_no_row(start, sqlite_database, spec):
    jobs = JobStore(sqlite_database)
    job = jobs.create("org-a", "proj_a", spec, {})
    lines = start(job.id, Leases(jobs).claim(job))
    assert ROW not in "\n".join(lines)
    records = [json.loads(line) for line in lines]
    crash = records[-1]
    assert (crash["level"], crash["job_id"], crash["exception"]) == ("error", job.id, "ValueError")
    assert crash["logger"] == "reft_ray.jobs.driver"
    assert "failing" in crash["where"][-1]
    assert "a library failed" in {record["message"] for record in records}
    assert "uncaught exception" in {record["message"] for record in records}


def test_a_superfluous_driver_logs_that(start, sqlite_database, spec):
    jobs = JobStore(sqlite_database)
    job = jobs.create("org-a", "proj_a", spec, {})
    attempt = Leases(jobs).claim(job)
    jobs.move(job.id, Status.CANCELLED, Event("cancelled"))
    (line,) = map(json.loads, start(job.id, attempt))
    assert (line["level"], line["job_id"]) == ("info", job.id)
    assert "no longer current" in line["message"]


def test_a_driver_that_cannot_start_says_so_without_a_plain_traceback(tmp_path):
    command = [sys.executable, "-m", "reft_ray.jobs.driver", "ftjob-x", "1"]
    environment = {**os.environ, CONFIG_VARIABLE: json.dumps({"database_url": f"sqlite:///{ROW}"})}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert ended.returncode != 0
    assert ROW not in ended.stderr
    assert [json.loads(line)["message"] for line in ended.stderr.splitlines()] == ["uncaught exception"]
    assert not list(Path(tmp_path).iterdir())
