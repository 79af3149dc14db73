"""The cluster behind a command: the one that is there, or a quiet one on this machine."""

from __future__ import annotations

import logging
import os


def start_ray(num_cpus: int | None = None) -> None:
    """Connect to the cluster in RAY_ADDRESS, or start one here that only this machine can reach."""
    import ray

    if ray.is_initialized():
        return
    logging.getLogger("ray").setLevel(logging.WARNING)
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
        return
    # Unset, a local start would turn token authentication on and leave a token file that later clusters trip over.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    # Ray Data needs CPU slots beside those that training workers hold, also on two cores.
    slots = num_cpus or max(4, os.cpu_count() or 4)
    # Ray warns the user of more processes than it would start for the cores; runs beside each other start them.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(slots))
    ray.init(
        # One of its own: otherwise Ray joins whatever `ray start` has left on this machine, and refuses the slots.
        address="local",
        num_cpus=slots,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        log_to_driver=False,
        logging_level=logging.WARNING,
        object_store_memory=512 << 20,
    )
    from ray.data import DataContext

    DataContext.get_current().enable_progress_bars = False
