"""The process that runs one job: `python -m reft_ray.jobs.driver JOB ATTEMPT`, configured by the environment."""

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
from reft_ray.openmp import spin_briefly
from reft_ray.settings import load_factory
from reft_ray.telemetry import logs
from reft_ray.telemetry.metric_types import DEFAULT_APPLICATION
from reft_ray.telemetry.recorder import NullRecorder, Recorder

CONFIG_VARIABLE = "REFT_DRIVER"
_VARIABLE = "env"
LOST_LEASE_SECONDS = 10.0
"""How long a driver that lost its lease may take to exit by itself."""

# As a module that runs, `__name__` is `__main__`, whose log would be a plain one.
logger = logging.getLogger("reft_ray.jobs.driver")


@dataclass(frozen=True, slots=True)
class DriverConfig:
    """A driver's configuration. It is passed in the environment, because the database URL may hold a password.

    A `database_url` of `env:NAME` is the value of the variable NAME where the driver runs. `steps` and `recorder` are
    factories (see `settings.load_factory`), called with `options` and with `application`. `handle` is the launcher's
    handle of this driver, where that is not its process. The limits are FileStore's. With `sign_releases`, a model that
    fails the gate waits for two people.
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
    sign_releases: bool = False

    def to_json(self) -> str:
        """Serialize for the environment."""
        return json.dumps(asdict(self))

    @classmethod
    def from_environment(cls) -> DriverConfig:
        """Read the configuration that the launcher set. Raises UsageError."""
        if CONFIG_VARIABLE not in os.environ:
            raise UsageError(f"{CONFIG_VARIABLE} is not set: drivers are started by the service")
        config = cls(**json.loads(os.environ[CONFIG_VARIABLE]))
        return replace(config, database_url=resolved(config.database_url))

    def make_steps(self) -> Steps:
        """Call the factory of the steps."""
        steps: Steps = load_factory(self.steps)(**self.options)
        return steps

    def make_recorder(self) -> Recorder:
        """Call the factory of the metrics recorder."""
        recorder: Recorder = load_factory(self.recorder)(self.application) if self.recorder else NullRecorder()
        return recorder


def resolved(database_url: str) -> str:
    """The URL itself, or the value of NAME for `env:NAME`. Raises UsageError where NAME is not set."""
    kind, _, name = database_url.partition(":")
    if kind != _VARIABLE:
        return database_url
    if name not in os.environ:
        raise UsageError(f"the database URL is configured as the variable {name}, which is not set here")
    return os.environ[name]


def drive(job_id: str, attempt: int, config: DriverConfig) -> int:
    """Run the job until it ends or waits. Returns the exit code: 0 when it ended or waits, 1 to be started again."""
    database = Database.open(config.database_url, migrate=False)
    recorder = config.make_recorder()
    leases = Leases(JobStore(database, recorder), config.lease_seconds)
    owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
    try:
        job = leases.acquire(job_id, attempt, owner)
    except LeaseLostError:
        logger.info("attempt %d is no longer current", attempt)
        return 0
    leases.set_handle(job_id, attempt, config.handle or process_handle(os.getpid()))
    files = FileStore(database, ContentStore(config.files_uri), config.max_file_bytes, config.max_project_bytes)
    run = JobRun(job, leases, owner, files)
    ended = threading.Event()
    heartbeat = threading.Thread(target=_beat, args=(run, config, ended), name="heartbeat", daemon=True)
    heartbeat.start()
    _stop_on_signals(run)
    try:
        run_job(run, config.make_steps(), recorder, config.sign_releases)
    except (StoppedError, LeaseLostError) as stop:
        logger.info("%s", stop)
    except Exception:
        # The log formatter writes its type and traceback only: its message may quote a row.
        logger.exception("attempt %d crashed", attempt)
        return 1
    finally:
        ended.set()
        heartbeat.join()
        recorder.close()
    run.release()
    return 0


def process_handle(pid: int) -> str:
    """A handle of a process; its start time distinguishes it from a later one with the same id."""
    return f"process:{socket.gethostname()}:{pid}:{psutil.Process(pid).create_time():.2f}"


def handle_parts(handle: str) -> tuple[str, int, float] | None:
    """Host, process id and start time (seconds since the epoch); None for a handle that is not a process."""
    kind, *parts = handle.split(":")
    if kind != "process":
        return None
    host, pid, started = parts
    return host, int(pid), float(started)


def _beat(run: JobRun, config: DriverConfig, ended: threading.Event) -> None:
    failing = 0.0
    while not ended.wait(config.heartbeat_seconds):
        try:
            run.heartbeat()
            failing = 0.0
        except OperationalError:
            # The database may be restarting; the lease outlasts that for a while.
            failing += config.heartbeat_seconds
            if failing >= config.lease_seconds:
                run.stop()
        if run.lost and not ended.wait(LOST_LEASE_SECONDS):
            logger.error("the lease is lost and the step does not end: exiting")
            os._exit(3)


def _stop_on_signals(run: JobRun) -> None:
    def stop(number: int, frame: FrameType | None) -> None:
        run.stop()

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)


def main() -> int:
    """The command line."""
    spin_briefly()
    logs.configure(whole_process=True)
    job_id, attempt = sys.argv[1:]
    with logs.log_context(job_id=job_id):
        return drive(job_id, int(attempt), DriverConfig.from_environment())


if __name__ == "__main__":
    sys.exit(main())
