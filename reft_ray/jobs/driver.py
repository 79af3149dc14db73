"""The process that drives one job: `python -m reft_ray.jobs.driver JOB ATTEMPT`, configured by the environment."""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from types import FrameType
from typing import Any

import psutil
from sqlalchemy.exc import OperationalError

from reft_ray.core.errors import StoppedError, UsageError
from reft_ray.jobs.content import ContentStore
from reft_ray.jobs.database import Database
from reft_ray.jobs.errors import LeaseLostError
from reft_ray.jobs.files import MAX_FILE_BYTES, MAX_PROJECT_BYTES, FileStore
from reft_ray.jobs.job_store import JobStore
from reft_ray.jobs.lease import LEASE_SECONDS, Leases
from reft_ray.jobs.lifecycle import run_job
from reft_ray.jobs.run import JobRun
from reft_ray.jobs.steps import Steps
from reft_ray.settings import load_factory
from reft_ray.telemetry import logs
from reft_ray.telemetry.metric_types import DEFAULT_APPLICATION
from reft_ray.telemetry.recorder import NullRecorder, Recorder

CONFIG_VARIABLE = "REFT_DRIVER"
_VARIABLE = "env"
LOST_LEASE_SECONDS = 10.0
"""A driver that lost its job has so long to end by itself."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DriverConfig:
    """What a driver needs; it travels in the environment, because the database URL may hold a password.

    A `database_url` of `env:NAME` stands for the variable NAME where the driver runs. `steps` names a factory as
    `module:function`, which is called with `options`; `recorder` one of a Recorder, called with `application`.
    `handle` is how the launcher calls this driver, where that is not its process. The limits are FileStore's.
    """

    database_url: str
    files_uri: str
    steps: str
    options: Mapping[str, Any] = field(default_factory=dict)
    lease_seconds: float = LEASE_SECONDS
    heartbeat_seconds: float = 2.0
    recorder: str | None = None
    application: str = DEFAULT_APPLICATION
    max_file_bytes: int = MAX_FILE_BYTES
    max_project_bytes: int = MAX_PROJECT_BYTES
    handle: str | None = None

    def to_json(self) -> str:
        """For the environment."""
        return json.dumps(asdict(self))

    @classmethod
    def from_environment(cls) -> DriverConfig:
        """What the launcher put there."""
        if CONFIG_VARIABLE not in os.environ:
            raise UsageError(f"{CONFIG_VARIABLE} is not set: drivers are started by the service")
        config = cls(**json.loads(os.environ[CONFIG_VARIABLE]))
        return replace(config, database_url=resolved(config.database_url))

    def make_steps(self) -> Steps:
        """The steps that the factory makes."""
        steps: Steps = load_factory(self.steps)(**self.options)
        return steps

    def make_recorder(self) -> Recorder:
        """Where this driver counts."""
        recorder: Recorder = load_factory(self.recorder)(self.application) if self.recorder else NullRecorder()
        return recorder


def resolved(database_url: str) -> str:
    """The URL itself, or what the variable holds that `env:NAME` names. Raises UsageError where it is not set."""
    kind, _, name = database_url.partition(":")
    if kind != _VARIABLE:
        return database_url
    if name not in os.environ:
        raise UsageError(f"the database URL is to be found in {name}, which is not set here")
    return os.environ[name]


def drive(job_id: str, attempt: int, config: DriverConfig) -> int:
    """Drive the job as far as it goes now. The exit code: 0 ended or waits, 1 crashed and to be started again."""
    database = Database.open(config.database_url, migrate=False)
    recorder = config.make_recorder()
    leases = Leases(JobStore(database, recorder), config.lease_seconds)
    owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
    try:
        job = leases.acquire(job_id, attempt, owner)
    except LeaseLostError:
        logger.info("attempt %d is not wanted any more", attempt)
        return 0
    leases.set_handle(job_id, attempt, config.handle or process_handle(os.getpid()))
    files = FileStore(database, ContentStore(config.files_uri), config.max_file_bytes, config.max_project_bytes)
    run = JobRun(job, leases, owner, files)
    over = threading.Event()
    heart = threading.Thread(target=_beat, args=(run, config, over), name="heartbeat", daemon=True)
    heart.start()
    _stop_on_signals(run)
    try:
        run_job(run, config.make_steps(), recorder)
    except (StoppedError, LeaseLostError) as stop:
        logger.info("%s", stop)
    except Exception:
        # Our logs tell its type and its place; its message may quote a row.
        logger.exception("attempt %d crashed", attempt)
        return 1
    finally:
        over.set()
        heart.join()
        recorder.close()
    run.release()
    return 0


def process_handle(pid: int) -> str:
    """A handle that a later process with the same number does not fit."""
    return f"process:{socket.gethostname()}:{pid}:{psutil.Process(pid).create_time():.2f}"


def handle_parts(handle: str) -> tuple[str, int, float] | None:
    """Host, process number and start time (seconds since the epoch); None for what is no process."""
    kind, *parts = handle.split(":")
    if kind != "process":
        return None
    host, pid, started = parts
    return host, int(pid), float(started)


def _beat(run: JobRun, config: DriverConfig, over: threading.Event) -> None:
    silent = 0.0
    while not over.wait(config.heartbeat_seconds):
        try:
            run.heartbeat()
            silent = 0.0
        except OperationalError:
            # The database may be restarting; the lease covers that for a while.
            silent += config.heartbeat_seconds
            if silent >= config.lease_seconds:
                run.stop()
        if run.lost and over.wait(LOST_LEASE_SECONDS) is False:
            logger.error("the lease is lost and the step does not end: leaving")
            os._exit(3)


def _stop_on_signals(run: JobRun) -> None:
    def stop(number: int, frame: FrameType | None) -> None:
        run.stop()

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)


def main() -> int:
    """The command line."""
    logs.configure()
    job_id, attempt = sys.argv[1:]
    with logs.log_context(job_id=job_id):
        return drive(job_id, int(attempt), DriverConfig.from_environment())


if __name__ == "__main__":
    sys.exit(main())
