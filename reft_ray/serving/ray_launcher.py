"""Drivers as Ray jobs: they survive the gateway that started them, and Ray's job server ends and tells of them."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from ray.job_submission import JobStatus, JobSubmissionClient
from sqlalchemy.engine import make_url

from reft_ray.core.errors import UsageError
from reft_ray.jobs.driver import CONFIG_VARIABLE, DriverConfig

HANDLE = "ray"
STOP_SECONDS = 20.0
"""How long to wait for Ray to end a driver; Ray itself follows its SIGTERM with SIGKILL after `_GRACE_SECONDS`."""

_GRACE_SECONDS = 1
_POLL_SECONDS = 0.1
_UNDER_WAY = (JobStatus.PENDING, JobStatus.RUNNING)


@dataclass(frozen=True)
class RayLauncher:
    """A `jobs.launcher.Launcher` on the job server of a Ray cluster, at `address` (its dashboard's, http://...:8265).

    - A driver waits for others most of the time; what trains, screens and evaluates takes resources of its own, those
      of the base model's preset. `cpus` and `resources` (custom ones) only say where a driver may run.
    - What a job is given can be read in Ray's dashboard, so a database URL with a password is refused: name a variable
      that the cluster's nodes have (`env:NAME`).

    Raises UsageError for such a URL.
    """

    config: DriverConfig
    address: str
    cpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)
    python: str = sys.executable

    def __post_init__(self) -> None:
        url = self.config.database_url
        if not url.startswith("env:") and make_url(url).password:
            raise UsageError(
                "the database URL holds a password, which Ray's dashboard would show: set it as an environment "
                "variable on the cluster's nodes and name it here as env:NAME"
            )

    @cached_property
    def _client(self) -> JobSubmissionClient:
        return JobSubmissionClient(self.address)

    def start(self, job_id: str, attempt: int) -> str:
        """See Launcher."""
        name = f"{job_id}-{attempt}"
        handle = f"{HANDLE}:{name}"
        self._client.submit_job(
            entrypoint=shlex.join([self.python, "-m", "reft_ray.jobs.driver", job_id, str(attempt)]),
            submission_id=name,
            runtime_env={
                "env_vars": {
                    CONFIG_VARIABLE: replace(self.config, handle=handle).to_json(),
                    "RAY_JOB_STOP_WAIT_TIME_S": str(_GRACE_SECONDS),
                }
            },
            metadata={"finetuning_job": job_id, "attempt": str(attempt)},
            entrypoint_num_cpus=self.cpus or None,
            entrypoint_resources=dict(self.resources) or None,
        )
        return handle

    def stop(self, handle: str) -> None:
        """See Launcher. Ray ends the process and its children; actors and workers go with their driver."""
        name = _name(handle)
        if name is None:
            return
        until = time.monotonic() + STOP_SECONDS
        if self._status(name) in _UNDER_WAY:
            self._client.stop_job(name)
        while self._status(name) in _UNDER_WAY and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)

    def is_alive(self, handle: str) -> bool | None:
        """See Launcher. A cluster that was restarted knows none of its earlier jobs: they ended with it."""
        name = _name(handle)
        if name is None:
            return None
        try:
            return self._status(name) in _UNDER_WAY
        except OSError:
            return None

    def is_waiting(self, handle: str) -> bool:
        """See Launcher."""
        name = _name(handle)
        try:
            return name is not None and self._status(name) == JobStatus.PENDING
        except OSError:
            return False

    def _status(self, name: str) -> JobStatus | None:
        try:
            return self._client.get_job_status(name)
        except RuntimeError as error:
            if "404" in str(error):
                return None
            raise ConnectionError(str(error)) from error


def _name(handle: str) -> str | None:
    """The job's name; None for a driver that another kind of launcher started, of which only its lease can tell."""
    kind, _, name = handle.partition(":")
    return name if kind == HANDLE else None
