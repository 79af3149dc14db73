"""Naming a process so that it can be found again after a restart, and not be taken for a later one."""

from __future__ import annotations

import socket

import psutil


def process_handle(pid: int) -> str:
    """A handle that a later process with the same number does not fit."""
    return f"process:{socket.gethostname()}:{pid}:{psutil.Process(pid).create_time():.2f}"


def handle_parts(handle: str) -> tuple[str, int, float]:
    """Host, process number and start time (seconds since the epoch)."""
    _, host, pid, started = handle.split(":")
    return host, int(pid), float(started)
