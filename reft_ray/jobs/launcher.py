"""Starting and ending the drivers of jobs: one Protocol, and processes on this machine behind it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Protocol

import psutil

from reft_ray.jobs.driver import CONFIG_VARIABLE, DriverConfig
from reft_ray.jobs.processes import handle_parts, process_handle


class Launcher(Protocol):
    """Where drivers run. Handles are strings, because they are stored: a restarted service must find its drivers."""

    def start(self, job_id: str, attempt: int) -> str:
        """Start a driver for this attempt, not waiting for it; its handle."""
        ...

    def stop(self, handle: str) -> None:
        """End a driver and everything that it started, whether or not it still runs."""
        ...

    def is_alive(self, handle: str) -> bool | None:
        """Whether the driver runs; None when that cannot be known from here, and only its lease can tell."""
        ...


class ProcessLauncher:
    """Drivers as processes of this machine, each the leader of its own session.

    They do not end with the service: a job goes on while the gateway restarts.
    """

    def __init__(self, config: DriverConfig, log_dir: Path | None = None) -> None:
        self._config = config
        self._log_dir = log_dir
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, job_id: str, attempt: int) -> str:
        """See Launcher."""
        command = [sys.executable, "-m", "reft_ray.jobs.driver", job_id, str(attempt)]
        environment = {**os.environ, CONFIG_VARIABLE: self._config.to_json()}
        with self._log(job_id, attempt).open("ab") as log:
            child = subprocess.Popen(  # noqa: S603 - our own module
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        handle = process_handle(child.pid)
        self._children[handle] = child
        return handle

    def stop(self, handle: str) -> None:
        """See Launcher. SIGKILL: a driver that should save its state was told so through the job's record."""
        host, pid, _ = handle_parts(handle)
        if host != socket.gethostname() or self._is_reused(handle):
            return
        # The leader may be dead while what it started lives on: the group is found by its number.
        for process in psutil.process_iter():
            try:
                if os.getpgid(process.pid) == pid or os.getsid(process.pid) == pid:
                    process.send_signal(signal.SIGKILL)
            except (psutil.NoSuchProcess, ProcessLookupError, PermissionError):
                continue
        child = self._children.pop(handle, None)
        if child is not None:
            child.wait()

    def is_alive(self, handle: str) -> bool | None:
        """See Launcher."""
        host, pid, started = handle_parts(handle)
        if host != socket.gethostname():
            return None
        child = self._children.get(handle)
        if child is not None:
            return child.poll() is None
        try:
            process = psutil.Process(pid)
            return abs(process.create_time() - started) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def _is_reused(self, handle: str) -> bool:
        _, pid, started = handle_parts(handle)
        try:
            return abs(psutil.Process(pid).create_time() - started) >= 1
        except psutil.NoSuchProcess:
            return False

    def _log(self, job_id: str, attempt: int) -> Path:
        if self._log_dir is None:
            return Path(os.devnull)
        self._log_dir.mkdir(parents=True, exist_ok=True)
        return self._log_dir / f"{job_id}-{attempt}.log"
