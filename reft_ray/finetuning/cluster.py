"""The cluster behind a command: the one that is there, or a quiet one on this machine."""

from __future__ import annotations

import logging
import os

from reft_ray.local_ray import SMALL_LOOPBACK, join_ray, start_own_ray


def start_ray(num_cpus: int | None = None) -> None:
    """Use the cluster that is there, or start one here that only this machine can reach."""
    logging.getLogger("ray").setLevel(logging.WARNING)
    if join_ray():
        return
    # Ray Data needs CPU slots beside those that training workers hold, also on two cores.
    slots = num_cpus or max(4, os.cpu_count() or 4)
    # Ray warns the user of more processes than it would start for the cores; runs beside each other start them.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(slots))
    start_own_ray(slots, **SMALL_LOOPBACK)
    from ray.data import DataContext

    DataContext.get_current().enable_progress_bars = False
