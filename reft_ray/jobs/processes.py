"""Naming a process so that it can be found again after a restart, and not be taken for a later one."""

from __future__ import annotations

import socket

import psutil


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
