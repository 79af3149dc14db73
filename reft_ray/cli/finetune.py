"""`reft-ray finetune`: screen user rows and finetune a student on the kept ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reft_ray.cli.common import (
    JobThresholdFloorOption,
    JobThresholdOption,
    JsonOption,
    parse_settings,
    print_json,
    recording,
    user_errors,
)

if TYPE_CHECKING:
    from reft_ray.finetuning.config import Resources


def finetune(
    data: Annotated[list[str], typer.Argument(help="User rows: files, globs or URIs in any format that screen reads.")],
    base: Annotated[str, typer.Option(help="Base model: a directory or a hub id.")],
    out: Annotated[Path, typer.Option(help="Directory of the finished adapter.")],
    method: Annotated[str, typer.Option(help="sft, filter, distill or guided.")] = "guided",
    teacher: Annotated[Path | None, typer.Option(help="A Ref-Teacher of the base model.")] = None,
    alignment: Annotated[
        list[Path] | None, typer.Option(help="Labelled prompts with refusals and helpful answers, JSONL.")
    ] = None,
    refusals: Annotated[list[Path] | None, typer.Option(help="Refusals to harmful prompts (prompt, response).")] = None,
    helpful: Annotated[list[Path] | None, typer.Option(help="Answers to harmless prompts (prompt, response).")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any FinetuneConfig key, e.g. epochs=2.")] = None,
    max_reject_ratio: Annotated[
        float | None, typer.Option(help="Refuse the dataset if more than this share of its rows is withheld.")
    ] = None,
    job_threshold: JobThresholdOption = True,
    job_threshold_floor: JobThresholdFloorOption = 0.0,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Ray Train workers; 0 trains in this process, the default without RAY_ADDRESS and --gpus-per-worker."
        ),
    ] = None,
    gpus_per_worker: Annotated[
        float | None, typer.Option(help="GPUs of each worker; without workers the default is one if there is one.")
    ] = None,
    cpus_per_worker: Annotated[
        float | None, typer.Option(help="CPUs of each worker; on this machine by default all CPUs in equal shares.")
    ] = None,
    strategy: Annotated[str, typer.Option(help="data_parallel, or fsdp for models that do not fit.")] = "data_parallel",
    storage: Annotated[str | None, typer.Option(help="Checkpoints: a directory or pyarrow.fs URI.")] = None,
    run_id: Annotated[str | None, typer.Option(help="Name of the run; the same name resumes.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Filter user rows and finetune a base model on the kept ones (stage 2)."""
    with user_errors():
        from reft_ray.cli.progress import bar

        with bar("starting", quiet=as_json) as progress, recording() as recorder:
            from reft_ray.core.conversation import Label
            from reft_ray.finetuning.config import FinetuneConfig
            from reft_ray.finetuning.prompts import read_labelled
            from reft_ray.pipeline.local_run import LocalRun

            config = FinetuneConfig.of({"base": base, "method": method, **parse_settings(set_)})
            resources = _resources(workers, gpus_per_worker, cpus_per_worker, strategy, storage)
            rows = [row for path in alignment or () for row in read_labelled(path)]
            rows += [row for path in refusals or () for row in read_labelled(path, Label.HARMFUL)]
            rows += [row for path in helpful or () for row in read_labelled(path, Label.HARMLESS)]
            run = LocalRun(config, resources, out, teacher, rows, max_reject_ratio, job_threshold, job_threshold_floor)
            if resources.workers:
                _start_ray(resources)
            progress.phase("screening")
            counts = run.screen(data, progress.update, recorder)
            run.train(run_id, progress.note, recorder, progress.phase)
        report = {"out": str(out), "method": config.method.value, "rows": counts}
        if as_json:
            print_json(report)
        else:
            typer.echo(f"{out}: {config.method} on {counts['kept']} of {counts['rows']} rows")


def _resources(
    workers: int | None, gpus: float | None, cpus: float | None, strategy: str, storage: str | None
) -> Resources:
    """The resources that the options name, with defaults for this machine or for the cluster in RAY_ADDRESS."""
    import torch

    from reft_ray.finetuning.config import Resources
    from reft_ray.hf.machine import available_cpus

    cluster = bool(os.environ.get("RAY_ADDRESS"))
    if workers is None:
        needs_workers = cluster or gpus or strategy != "data_parallel" or "://" in (storage or "")
        workers = 1 if needs_workers else 0
    if gpus is None:
        gpus = 1 if not workers and torch.cuda.is_available() else 0
    if cpus is None and workers and not cluster and not gpus:
        cpus = max(1, available_cpus() // workers)
    values = {"workers": workers, "gpus_per_worker": gpus, "cpus_per_worker": cpus}
    return Resources.of({**values, "strategy": strategy, "storage": storage})


def _start_ray(resources: Resources) -> None:
    from math import ceil

    from reft_ray.local_ray import TRAINING_SLOTS, ensure_training_ray

    reserved = ceil(resources.workers * (resources.cpus_per_worker or 1))
    ensure_training_ray(max(TRAINING_SLOTS, os.cpu_count() or 1, reserved + 2))
