"""Work that needs a model and no worker group: a task with the resources of one training worker.

The process that drives a run may be small; what holds a model is placed by the cluster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError

from reft_ray.core.errors import ReftError, StoppedError
from reft_ray.finetuning.config import Resources
from reft_ray.finetuning.ray_runtime import set_threads
from reft_ray.finetuning.runtime import Stop

T = TypeVar("T")

_POLL_SECONDS = 0.5


def as_task(what: str, work: Callable[..., T], *args: Any, resources: Resources, stop: Stop | None = None) -> T:
    """What `work` gives for these arguments; `what` names it to people.

    Raises StoppedError, at once, when `stop` says so; ReftError when the task fails.
    """
    task: Any = ray.remote(
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker,
        max_retries=resources.max_failures,
        # A process that lived on would keep the model's memory from the workers that train next.
        max_calls=1,
    )(_work)
    future = task.options(name=what).remote(work, args)
    while not ray.wait([future], timeout=_POLL_SECONDS)[0]:
        if stop is not None and stop():
            ray.cancel(future, force=True)
            raise StoppedError(f"told to stop while {what}")
    try:
        result: T = ray.get(future)
    except RayError as error:
        raise ReftError(f"{what} failed: {cause_of(error)}") from error
    return result


def cause_of(error: BaseException) -> str:
    """The innermost message of a failed run or task: the worker's own error, not the wrappers around it."""
    failures = getattr(error, "worker_failures", None) or {}
    inner: BaseException = next(iter(failures.values()), error)
    while (cause := getattr(inner, "cause", None) or inner.__cause__) is not None and cause is not inner:
        inner = cause
    return str(inner).strip().splitlines()[-1] if str(inner).strip() else type(inner).__name__


def _work(work: Callable[..., T], args: tuple[Any, ...]) -> T:
    set_threads()
    return work(*args)
