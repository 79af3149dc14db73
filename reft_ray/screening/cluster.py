"""Ray for screening: the cluster that is there, or a local one that nobody else can reach."""

from __future__ import annotations

import ray

from reft_ray.core.errors import UsageError
from reft_ray.local_ray import SMALL_LOOPBACK, join_ray, start_own_ray


def ensure_ray(cpus: float = 0.0, gpus: float = 0.0) -> None:
    """Use the cluster that is there, or start one on this machine.

    Raises UsageError where a local Ray lacks the `cpus` or `gpus` of a single actor, which would wait for ever; any
    other cluster may grow.
    """
    if join_ray():
        return
    start_own_ray(**SMALL_LOOPBACK)
    for name, needed in (("CPU", cpus), ("GPU", gpus)):
        if needed > (there := ray.cluster_resources().get(name, 0.0)):
            raise UsageError(f"an actor asks for {needed:g} {name}s and this machine has {there:g}")
