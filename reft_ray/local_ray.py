"""Ray for a process: the cluster that it belongs to or is told to join, or one of its own on this machine."""

from __future__ import annotations

import logging
import os
from typing import Any

import ray


def join_ray() -> bool:
    """Use the Ray of this process, or connect to the cluster in RAY_ADDRESS; False where there is neither.

    Raises what `ray.init` raises for a cluster that cannot be reached.
    """
    if not ray.is_initialized():
        if not os.environ.get("RAY_ADDRESS"):
            return False
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    return True


def start_own_ray(num_cpus: int | None = None, **options: Any) -> None:
    """Start a Ray without a dashboard that ends with this process; `options` are those of `ray.init`."""
    # Unset, a local start would turn token authentication on and leave a token file that later clusters trip over.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    quiet = {"log_to_driver": False, "logging_level": logging.WARNING}
    # One of its own: otherwise Ray joins whatever `ray start` has left on this machine, and refuses the processors.
    ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, **(quiet | options))


SMALL_LOOPBACK: dict[str, Any] = {"_node_ip_address": "127.0.0.1", "object_store_memory": 512 << 20}
"""Options of a small Ray whose processes speak to each other on loopback."""
