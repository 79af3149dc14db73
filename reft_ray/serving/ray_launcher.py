"""Drivers as Ray jobs: they survive the gateway that started them; Ray's job server stops them and has their status."""

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
"""How long to wait for Ray to stop a driver; Ray sends SIGTERM, and SIGKILL `_GRACE_SECONDS` later."""

AGENT_SECONDS = 30.0
"""How long to wait for the first agent of a cluster that is starting."""

_NO_AGENT = "No available agent"
_GRACE_SECONDS = 1
_POLL_SECONDS = 0.1
_ONGOING = (JobStatus.PENDING, JobStatus.RUNNING)


@dataclass(frozen=True)
class RayLauncher:
    """A `jobs.launcher.Launcher` on the job server of a Ray cluster, at `address` (its dashboard's, http://...:8265).

    - A driver mostly waits: its workers for screening, training and evaluation request the preset's resources
      separately. `cpus` and the custom `resources` only determine where a driver may run.
    - Ray's dashboard shows a job's environment, so a database URL with a password raises UsageError: name a variable
      that is set on the cluster's nodes (`env:NAME`).
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
        """Start a driver; a cluster that starts itself has no agent for jobs yet, which is waited for."""
        name = f"{job_id}-{attempt}"
        handle = f"{HANDLE}:{name}"
        until = time.monotonic() + AGENT_SECONDS
        while True:
            try:
                self._submit(name, job_id, attempt, handle)
            except RuntimeError as error:
                if _NO_AGENT not in str(error) or time.monotonic() > until:
                    raise
                time.sleep(_POLL_SECONDS)
            else:
                return handle

    def _submit(self, name: str, job_id: str, attempt: int, handle: str) -> None:
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

    def stop(self, handle: str) -> None:
        """Ray stops the process and its children; actors and workers end with their driver."""
        name = _name(handle)
        if name is None:
            return
        until = time.monotonic() + STOP_SECONDS
        if self._status(name) in _ONGOING:
            self._client.stop_job(name)
        while self._status(name) in _ONGOING and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)

    def is_alive(self, handle: str) -> bool | None:
        """False for a job that the cluster does not know: it ended when the cluster was restarted."""
        name = _name(handle)
        if name is None:
            return None
        try:
            return self._status(name) in _ONGOING
        except OSError:
            return None

    def is_waiting(self, handle: str) -> bool:
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
    """The Ray job's name; None for a driver of another launcher, for which only its lease shows whether it runs."""
    kind, _, name = handle.partition(":")
    return name if kind == HANDLE else None
