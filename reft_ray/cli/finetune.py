"""`reft-ray finetune`: screen user rows and finetune a student on the kept ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reft_ray.cli.common import JsonOption, parse_settings, print_json, recording, user_errors


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
    workers: Annotated[int, typer.Option(help="Ray Train workers; 0 trains in this process.")] = 1,
    gpus_per_worker: Annotated[float, typer.Option(help="GPUs of each worker.")] = 0,
    cpus_per_worker: Annotated[float, typer.Option(help="CPUs of each worker.")] = 1,
    strategy: Annotated[str, typer.Option(help="data_parallel, or fsdp for models that do not fit.")] = "data_parallel",
    storage: Annotated[str | None, typer.Option(help="Checkpoints: a directory or pyarrow.fs URI.")] = None,
    run_id: Annotated[str | None, typer.Option(help="Name of the run; the same name resumes.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Filter user rows and finetune a base model on the kept ones (stage 2)."""
    with user_errors():
        from reft_ray.cli.progress import bar
        from reft_ray.core.conversation import Label
        from reft_ray.finetuning.config import FinetuneConfig, Resources
        from reft_ray.finetuning.prompts import read_labelled
        from reft_ray.local_ray import ensure_training_ray
        from reft_ray.pipeline.local_run import LocalRun

        config = FinetuneConfig.of({"base": base, "method": method, **parse_settings(set_)})
        resources = Resources.of(
            {
                "workers": workers,
                "gpus_per_worker": gpus_per_worker,
                "cpus_per_worker": cpus_per_worker,
                "strategy": strategy,
                "storage": storage,
            }
        )
        rows = [row for path in alignment or () for row in read_labelled(path)]
        rows += [row for path in refusals or () for row in read_labelled(path, Label.HARMFUL)]
        rows += [row for path in helpful or () for row in read_labelled(path, Label.HARMLESS)]
        run = LocalRun(config, resources, out, teacher, rows, max_reject_ratio)
        ensure_training_ray()
        with recording() as recorder:
            with bar("screening", quiet=as_json) as progress:
                counts = run.screen(data, progress.update, recorder)
            with bar("finetuning", quiet=as_json) as progress:
                run.train(run_id, progress.update, recorder)
        report = {"out": str(out), "method": config.method.value, "rows": counts}
        if as_json:
            print_json(report)
        else:
            typer.echo(f"{out}: {config.method} on {counts['kept']} of {counts['rows']} rows")
