"""`reft-ray tune`: search over learning rate, LoRA rank and alpha."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from reft_ray.cli.common import JsonOption, TeacherOption, parse_settings, print_json, recording, user_errors
from reft_ray.cli.finetune import (
    AlignmentOption,
    HelpfulOption,
    RefusalsOption,
    alignment_from,
    validation_from,
)
from reft_ray.cli.resources import resources_of, start_ray

_SETTINGS = ("learning_rate", "rank", "alpha")


def tune(
    data: Annotated[list[str], typer.Argument(help="User rows: files, globs or URIs in any format that screen reads.")],
    base: Annotated[str, typer.Option(help="Base model: a directory or a hub id.")],
    out: Annotated[Path, typer.Option(help="Directory of the best adapter.")],
    validation: Annotated[Path, typer.Option(help="Answered rows, JSONL, that are not learned: trials are compared.")],
    method: Annotated[str, typer.Option(help="sft, filter, distill or guided.")] = "guided",
    teacher: TeacherOption = None,
    alignment: AlignmentOption = None,
    refusals: RefusalsOption = None,
    helpful: HelpfulOption = None,
    learning_rate: Annotated[list[float] | None, typer.Option(help="A learning rate to try; repeatable.")] = None,
    rank: Annotated[list[int] | None, typer.Option(help="A LoRA rank to try; repeatable.")] = None,
    alpha: Annotated[list[float] | None, typer.Option(help="A weight of distillation to try; repeatable.")] = None,
    trials: Annotated[int, typer.Option(min=1, help="Trials at most.")] = 8,
    safety_weight: Annotated[
        float, typer.Option(min=0, help="Weight of the KL to the Ref-Teacher, added to the validation loss.")
    ] = 1.0,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any other FinetuneConfig key, e.g. epochs=1.")
    ] = None,
    gpus_per_trial: Annotated[float | None, typer.Option(help="GPUs of a trial; default: one if there is one.")] = None,
    cpus_per_trial: Annotated[float, typer.Option(help="CPUs of a trial.")] = 1,
    storage: Annotated[str | None, typer.Option(help="Directory of the trials that all machines see.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Screen user rows once, finetune on the kept ones with several settings, and keep the best adapter."""
    with user_errors():
        from reft_ray.cli.progress import bar

        with bar("starting", quiet=as_json) as progress, recording() as recorder:
            from reft_ray.finetuning.config import FinetuneConfig
            from reft_ray.pipeline.local_run import LocalRun
            from reft_ray.pipeline.tune import Space, search

            config = FinetuneConfig.of({"base": base, "method": method, **parse_settings(set_)})
            alone = resources_of(0, gpus_per_trial, cpus_per_trial, "data_parallel", storage)
            rows = alignment_from(alignment, refusals, helpful)
            run = LocalRun(config, alone, out, teacher, rows, validation=validation_from(validation))
            start_ray(alone)
            progress.phase("screening")
            counts = run.screen(data, progress.update, recorder)
            progress.phase("trials")
            chosen: dict[str, Any] = {"learning_rate": learning_rate, "rank": rank, "alpha": alpha}
            space = Space(**{name: tuple(values) for name, values in chosen.items() if values})
            most = min(trials, space.size)
            found = search(
                config,
                run.inputs(alone),
                out,
                alone,
                space,
                trials,
                safety_weight,
                lambda done: progress.phase("trials", done / most, f"{done} of {most} trials"),
            )
        figures = ("valid_loss", "distill", "score")
        table = [{**trial.settings, **{name: getattr(trial, name) for name in figures}} for trial in found]
        if as_json:
            print_json({"out": str(out), "rows": counts, "best": table[0], "trials": table})
            return
        typer.echo("  ".join(f"{name:>13}" for name in (*_SETTINGS, *figures)))
        for row in table:
            typer.echo("  ".join(f"{row[name]:>13.4g}" for name in (*_SETTINGS, *figures)))
        typer.echo(f"{out}: the best of {len(table)} trials, on {counts['kept']} of {counts['rows']} rows")
