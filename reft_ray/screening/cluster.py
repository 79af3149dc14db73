"""Ray for screening: the cluster that is there, or a local one that nobody else can reach."""

from __future__ import annotations

import logging
import os

import ray

OBJECT_STORE_BYTES = 512 << 20


def ensure_ray() -> None:
    """Use the initialised Ray, connect to the one that RAY_ADDRESS names, or start one on this machine."""
    if ray.is_initialized():
        return
    # Unset, a local start would turn token authentication on and leave a token file that later clusters trip over.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
        return
    ray.init(
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
