"""The options of every command that needs a model: workers, accelerators, sharding, precision, storage."""

from __future__ import annotations

import os
from math import ceil
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from reft_ray.finetuning.config import Resources

PANEL = "Resources"
WorkersOption = Annotated[
    int | None,
    typer.Option(
        help="Ray Train workers; 0 trains in this process. Default: one per GPU of this machine, 1 with RAY_ADDRESS.",
        rich_help_panel=PANEL,
    ),
]
GpusOption = Annotated[
    float | None,
    typer.Option(help="GPUs of each worker, fractions allowed; default: one if there is one.", rich_help_panel=PANEL),
]
CpusOption = Annotated[
    float | None,
    typer.Option(
        help="CPUs of each worker; on this machine by default all CPUs in equal shares.", rich_help_panel=PANEL
    ),
]
StrategyOption = Annotated[
    str,
    typer.Option(
        help="data_parallel, or fsdp: weights over the memory of all workers, for models that do not fit.",
        rich_help_panel=PANEL,
    ),
]
PrecisionOption = Annotated[
    str,
    typer.Option(
        help="float32 or bfloat16; auto: bfloat16 on a GPU, and without training where it is faster.",
        rich_help_panel=PANEL,
    ),
]
StorageOption = Annotated[
    str | None,
    typer.Option(
        help="Checkpoints: a directory or pyarrow.fs URI that all workers see; default: next to the output.",
        rich_help_panel=PANEL,
    ),
]


def accelerators() -> int:
    """The GPUs of this machine."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def default_gpus() -> float:
    """One GPU for each process that computes, if this machine or the cluster in RAY_ADDRESS has one."""
    if os.environ.get("RAY_ADDRESS"):
        import ray

        from reft_ray.local_ray import join_ray

        join_ray()
        return 1.0 if ray.cluster_resources().get("GPU") else 0.0
    return 1.0 if accelerators() else 0.0


def resources_of(
    workers: int | None, gpus: float | None, cpus: float | None, strategy: str, storage: str | None
) -> Resources:
    """The resources that the options name, with defaults for this machine or for the cluster in RAY_ADDRESS."""
    from reft_ray.finetuning.config import Resources
    from reft_ray.hf.machine import available_cpus

    cluster = bool(os.environ.get("RAY_ADDRESS"))
    several = accelerators() if gpus is None and not cluster else 0
    if workers is None:
        needs_workers = cluster or gpus or strategy != "data_parallel" or "://" in (storage or "")
        workers = max(1, several) if needs_workers or several > 1 else 0
    if gpus is None:
        gpus = default_gpus()
    if cpus is None and workers and not cluster and not gpus:
        cpus = max(1, available_cpus() // workers)
    values = {"workers": workers, "gpus_per_worker": gpus, "cpus_per_worker": cpus}
    return Resources.of({**values, "strategy": strategy, "storage": storage})


def start_ray(resources: Resources) -> None:
    """Start Ray on this machine with room for a run's workers, or connect to RAY_ADDRESS."""
    from reft_ray.local_ray import TRAINING_SLOTS, ensure_training_ray

    reserved = ceil(resources.workers * (resources.cpus_per_worker or 1))
    ensure_training_ray(max(TRAINING_SLOTS, os.cpu_count() or 1, reserved + 2))


def with_precision(precision: str) -> dict[str, Any]:
    """The option as a key of a training configuration; `auto` leaves what --set says."""
    return {} if precision == "auto" else {"precision": precision}
