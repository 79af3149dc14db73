"""Ray for screening: the cluster that is there, or a local one that nobody else can reach."""

from __future__ import annotations

import logging
import os

import ray

from reft_ray.core.errors import UsageError

OBJECT_STORE_BYTES = 512 << 20


def ensure_ray(cpus: float = 0.0, gpus: float = 0.0) -> None:
    """Use the initialised Ray, connect to the one that RAY_ADDRESS names, or start one on this machine.

    Raises UsageError where a local Ray lacks the `cpus` or `gpus` of a single actor, which would wait for ever; any
    other cluster may grow.
    """
    if ray.is_initialized():
        return
    # Unset, a local start would turn token authentication on and leave a token file that later clusters trip over.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
        return
    ray.init(
        address="local",  # and not whatever `ray start` has left on this machine
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    for name, needed in (("CPU", cpus), ("GPU", gpus)):
        if needed > (there := ray.cluster_resources().get(name, 0.0)):
            raise UsageError(f"an actor asks for {needed:g} {name}s and this machine has {there:g}")
