"""The one way to a Ray: join the cluster of this process or of RAY_ADDRESS, or start a small one on this machine."""

from __future__ import annotations

import logging
import os
import signal
import threading
from typing import Any

import ray

_LOOPBACK: dict[str, Any] = {"_node_ip_address": "127.0.0.1", "object_store_memory": 512 << 20}

TRAINING_SLOTS = 4
"""CPU slots at least of a Ray that trains, also on two cores: Ray Data needs some in addition to the workers'."""


def join_ray() -> bool:
    """Use the Ray of this process, or connect to the cluster in RAY_ADDRESS; False without either.

    Raises what `ray.init` raises for a cluster that cannot be reached.
    """
    if not ray.is_initialized():
        if not os.environ.get("RAY_ADDRESS"):
            return False
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    return True


def start_own_ray(num_cpus: int | None = None, **options: Any) -> None:
    """Start a Ray without a dashboard that ends with this process; `options` are those of `ray.init`."""
    # Unset, a local start would turn token authentication on and leave a token file that breaks later clusters.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    quiet = {"log_to_driver": False, "logging_level": logging.WARNING}
    # Without an address Ray joins whatever `ray start` left on this machine, and refuses `num_cpus`.
    ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, **(quiet | options))


def ensure_ray(num_cpus: int | None = None) -> bool:
    """Join a Ray, or start one that only this machine can reach; True if it was started."""
    if join_ray():
        return False
    start_own_ray(num_cpus, **_LOOPBACK)
    return True


def ensure_training_ray(num_cpus: int | None = None, keep_sigterm: bool = False) -> None:
    """`ensure_ray` with CPU slots for Ray Data in addition to those of training workers, also on two cores.

    With `keep_sigterm` the process keeps its SIGTERM handler, which `ray.init` replaces.
    """
    logging.getLogger("ray").setLevel(logging.WARNING)
    slots = num_cpus or max(TRAINING_SLOTS, os.cpu_count() or 1)
    handler = signal.getsignal(signal.SIGTERM)
    if not ray.is_initialized() and not os.environ.get("RAY_ADDRESS"):
        # Ray warns of more worker processes than cores; concurrent runs start them.
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(slots))
    if ensure_ray(slots):
        from ray.data import DataContext

        DataContext.get_current().enable_progress_bars = False
    if keep_sigterm and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)
