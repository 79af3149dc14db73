"""The driver's process, from its command line to its log."""

import json
import logging
import sys

import pytest

from reft_ray.jobs import driver
from reft_ray.jobs.driver import CONFIG_VARIABLE, DriverConfig
from reft_ray.jobs.job import Event, Status
from reft_ray.jobs.job_store import JobStore
from reft_ray.jobs.lease import Leases

ROW = "how do I steal a car"


def failing_steps():
    """A factory whose error quotes a row."""
    raise ValueError(f"cannot read row {ROW}")


@pytest.fixture
def start(sqlite_database, content, monkeypatch, capsys):
    """Run a driver of one attempt; returns its exit code and log lines."""

    def run(job_id, attempt):
        url = sqlite_database.engine.url.render_as_string(hide_password=False)
        config = DriverConfig(url, content.uri("x").removesuffix("/x"), f"{__name__}:failing_steps")
        monkeypatch.setenv(CONFIG_VARIABLE, config.to_json())
        monkeypatch.setattr(sys, "argv", ["driver", job_id, str(attempt)])
        monkeypatch.setattr(driver, "load_factory", lambda _: failing_steps)
        monkeypatch.setattr(driver, "_stop_on_signals", lambda _: None)
        code = driver.main()
        return code, [json.loads(line) for line in capsys.readouterr().err.splitlines()]

    logger = logging.getLogger("reft_ray")
    before = logger.propagate, logger.level, list(logger.handlers)
    yield run
    logger.propagate, logger.level, logger.handlers[:] = before


def test_a_crash_is_logged_with_type_traceback_and_job(start, sqlite_database, spec):
    jobs = JobStore(sqlite_database)
    job = jobs.create("org-a", "proj_a", spec, {})
    code, (line,) = start(job.id, Leases(jobs).claim(job))
    assert (code, line["level"], line["job_id"], line["exception"]) == (1, "error", job.id, "ValueError")
    assert "failing_steps" in line["where"][-1]
    assert ROW not in json.dumps(line)


def test_a_superfluous_driver_logs_that(start, sqlite_database, spec):
    jobs = JobStore(sqlite_database)
    job = jobs.create("org-a", "proj_a", spec, {})
    attempt = Leases(jobs).claim(job)
    jobs.move(job.id, Status.CANCELLED, Event("cancelled"))
    code, (line,) = start(job.id, attempt)
    assert (code, line["level"], line["job_id"]) == (0, "info", job.id)
    assert "no longer current" in line["message"]
