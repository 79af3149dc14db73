"""Starting and stopping the drivers of jobs: the Protocol, and drivers as local processes."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import psutil

from reft_ray.jobs.driver import CONFIG_VARIABLE, DriverConfig, handle_parts, process_handle


class Launcher(Protocol):
    """Runs drivers. Handles are strings, because they are stored: a restarted service must find its drivers."""

    def start(self, job_id: str, attempt: int) -> str:
        """Start a driver for this attempt without waiting for it; returns its handle."""
        ...

    def stop(self, handle: str) -> None:
        """Kill a driver and its child processes, whether or not it still runs."""
        ...

    def is_alive(self, handle: str) -> bool | None:
        """Whether the driver runs; None when only its lease can show that."""
        ...

    def is_waiting(self, handle: str) -> bool:
        """Whether the driver still waits for resources."""
        ...


class ProcessLauncher:
    """Drivers as local processes in their own sessions, so a job keeps running while the gateway restarts."""

    def __init__(
        self, config: DriverConfig, log_dir: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        self._config = config
        self._log_dir = log_dir
        self._environment = environment

    def start(self, job_id: str, attempt: int) -> str:
        environment = os.environ if self._environment is None else self._environment
        command = [sys.executable, "-m", "reft_ray.jobs.driver", job_id, str(attempt)]
        log = self._log(job_id, attempt)
        pid = os.posix_spawn(
            sys.executable,
            command,
            {**environment, CONFIG_VARIABLE: self._config.to_json()},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
        )
        return process_handle(pid)

    def stop(self, handle: str) -> None:
        # SIGKILL: a driver that should save its state has learned that from the job's status.
        parts = handle_parts(handle)
        if parts is None or parts[0] != socket.gethostname() or _is_reused(*parts[1:]):
            return
        pid = parts[1]
        # The session leader may be dead while its children live: find them by the group's id.
        for process in psutil.process_iter():
            try:
                if os.getpgid(process.pid) == pid or os.getsid(process.pid) == pid:
                    process.send_signal(signal.SIGKILL)
            except (psutil.NoSuchProcess, ProcessLookupError, PermissionError):
                continue
        _reap(pid, 0)

    def is_alive(self, handle: str) -> bool | None:
        parts = handle_parts(handle)
        if parts is None or parts[0] != socket.gethostname():
            return None
        _, pid, started = parts
        _reap(pid, os.WNOHANG)
        try:
            process = psutil.Process(pid)
            return abs(process.create_time() - started) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def is_waiting(self, handle: str) -> bool:
        return False  # a process starts immediately

    def _log(self, job_id: str, attempt: int) -> Path:
        if self._log_dir is None:
            return Path(os.devnull)
        self._log_dir.mkdir(parents=True, exist_ok=True)
        return self._log_dir / f"{job_id}-{attempt}.log"


def _is_reused(pid: int, started: float) -> bool:
    try:
        return abs(psutil.Process(pid).create_time() - started) >= 1
    except psutil.NoSuchProcess:
        return False


def _reap(pid: int, options: int) -> None:
    """Reap an ended child; another process reaps those that are not our children."""
    with suppress(ChildProcessError):
        os.waitpid(pid, options)
