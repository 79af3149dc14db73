"""Ray under a training loop: a rank of a Ray Train worker group as a `Runtime`, and work that runs as a task."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.exceptions import RayError
from torch import Tensor

from reft_ray.core.errors import ReftError, StoppedError
from reft_ray.finetuning.config import Resources
from reft_ray.finetuning.progress import Sender
from reft_ray.finetuning.runtime import Stop
from reft_ray.hf.compute import use_threads
from reft_ray.openmp import waiting_variables

T = TypeVar("T")

_POLL_SECONDS = 0.5
_PHASE_SECONDS = 1.0
"""A phase is passed on at most this often: each time is a call of an actor."""


class RayRuntime:
    """Inside a Ray Train worker. Rank 0 also passes its metrics and its `pid` to the `sender`."""

    def __init__(self, sender: Sender | None = None) -> None:
        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.device = ray.train.torch.get_device()
        self._sender = sender
        self._phase, self._next_phase = "", 0.0
        self._restored: tempfile.TemporaryDirectory[str] | None = None

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over ranks; computed on this rank's device, as NCCL requires."""
        if self.world_size == 1:
            return tensor
        # NCCL and gloo both sum float64; a copy keeps the caller's tensor as it was.
        moved = tensor.to(self.device, copy=True)
        dist.all_reduce(moved)
        return moved.to(tensor.device)

    def latest_checkpoint(self) -> Path | None:
        """The latest checkpoint that the controller has committed, as a local directory."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return None
        # Kept for the life of the worker: the caller reads from it.
        self._restored = tempfile.TemporaryDirectory(prefix="reft-resume-")
        return Path(checkpoint.to_directory(self._restored.name))

    def stop_asked(self) -> bool:
        """Rank 0 asks and a reduction passes the answer on, so that all ranks end at the same step."""
        if self._sender is None or not self._sender.stoppable:
            return False
        asked = self.rank == 0 and self._sender.stop_asked()
        return bool(self.all_reduce(torch.tensor([float(asked)])).item())

    def phase(self, name: str, share: float = 0.0, note: str = "") -> None:
        """Rank 0 passes it to the process that started the run."""
        if self.rank or self._sender is None or (name == self._phase and time.monotonic() < self._next_phase):
            return
        self._phase, self._next_phase = name, time.monotonic() + _PHASE_SECONDS
        self._sender.phase(name, share, note)

    def report(self, metrics: Mapping[str, Any], write: Callable[[Path], None] | None = None) -> None:
        """Report on every rank; checkpoint directories of the ranks are merged by Ray Train."""
        if self.rank == 0 and self._sender is not None:
            self._sender({**metrics, "pid": os.getpid()})
        if write is None:
            ray.train.report(dict(metrics))
            return
        with tempfile.TemporaryDirectory(prefix="reft-checkpoint-") as folder:
            write(Path(folder))
            ray.train.report(
                dict(metrics),
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                checkpoint_dir_name=f"checkpoint-{metrics['step']:08d}",
            )


def set_threads() -> None:
    """Give the worker the threads of the CPUs that it reserved: Ray leaves torch with a single one."""
    use_threads(ray.get_runtime_context().get_assigned_resources().get("CPU", 1.0))


def as_task(what: str, work: Callable[..., T], *args: Any, resources: Resources, stop: Stop | None = None) -> T:
    """`as_tasks` with one task."""
    return as_tasks(what, work, [args], resources, stop)[0]


def as_tasks(
    what: str, work: Callable[..., T], calls: Sequence[tuple[Any, ...]], resources: Resources, stop: Stop | None = None
) -> list[T]:
    """Run `work` on each of these arguments as Ray tasks, each with the resources of one training worker.

    The process that drives a run may be small, so the cluster places what holds a model. `what` names the tasks in
    messages. Raises StoppedError at once when `stop` returns True, ReftError when a task fails; the others are ended.
    """
    task: Any = ray.remote(
        num_cpus=resources.cpus_per_worker or 1,
        num_gpus=resources.gpus_per_worker,
        max_retries=resources.max_failures,
        runtime_env={"env_vars": waiting_variables()},
        # A reused process would keep the model's memory from the workers that train next.
        max_calls=1,
    )(_work)
    futures = [task.options(name=what).remote(work, args) for args in calls]
    pending = futures
    try:
        while pending:
            done, pending = ray.wait(pending, timeout=_POLL_SECONDS)
            ray.get(done)
            if pending and stop is not None and stop():
                raise StoppedError(f"stopped while {what}")
        results: list[T] = ray.get(futures)
    except RayError as error:
        raise ReftError(f"{what} failed: {cause_of(error)}") from error
    finally:
        for future in pending:
            ray.cancel(future, force=True)
    return results


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
