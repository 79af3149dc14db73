"""`reft-ray finetune`: screen user rows and finetune a student on the kept ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reft_ray.cli.common import (
    JobThresholdFloorOption,
    JobThresholdOption,
    JsonOption,
    TeacherOption,
    parse_settings,
    print_json,
    recording,
    user_errors,
)
from reft_ray.cli.resources import (
    CpusOption,
    GpusOption,
    PrecisionOption,
    StorageOption,
    StrategyOption,
    WorkersOption,
    resources_of,
    start_ray,
    with_precision,
)
from reft_ray.core.job_threshold import FLOOR

if TYPE_CHECKING:
    from reft_ray.core.conversation import Example

AlignmentOption = Annotated[
    list[Path] | None,
    typer.Option(help="Labelled prompts with refusals and helpful answers, JSONL; default: those of the teacher."),
]
RefusalsOption = Annotated[list[Path] | None, typer.Option(help="Refusals to harmful prompts (prompt, response).")]
HelpfulOption = Annotated[list[Path] | None, typer.Option(help="Answers to harmless prompts (prompt, response).")]
ValidationOption = Annotated[
    Path | None,
    typer.Option(help="Answered rows, JSONL, that are not learned: their loss is measured at every checkpoint."),
]
TrackOption = Annotated[str | None, typer.Option(help="Send the metrics of the run to wandb, mlflow or tensorboard.")]


def finetune(
    data: Annotated[list[str], typer.Argument(help="User rows: files, globs or URIs in any format that screen reads.")],
    base: Annotated[str, typer.Option(help="Base model: a directory or a hub id.")],
    out: Annotated[Path, typer.Option(help="Directory of the finished adapter.")],
    method: Annotated[str, typer.Option(help="sft, filter, distill or guided.")] = "guided",
    teacher: TeacherOption = None,
    alignment: AlignmentOption = None,
    refusals: RefusalsOption = None,
    helpful: HelpfulOption = None,
    validation: ValidationOption = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any FinetuneConfig key, e.g. epochs=2.")] = None,
    track: TrackOption = None,
    max_reject_ratio: Annotated[
        float | None, typer.Option(help="Refuse the dataset if more than this share of its rows is withheld.")
    ] = None,
    job_threshold: JobThresholdOption = True,
    job_threshold_floor: JobThresholdFloorOption = FLOOR,
    workers: WorkersOption = None,
    gpus_per_worker: GpusOption = None,
    cpus_per_worker: CpusOption = None,
    strategy: StrategyOption = "data_parallel",
    precision: PrecisionOption = "auto",
    storage: StorageOption = None,
    run_id: Annotated[str | None, typer.Option(help="Name of the run; the same name resumes.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Filter user rows and finetune a base model on the kept ones (stage 2)."""
    with user_errors():
        from reft_ray.cli.progress import bar

        with bar("starting", quiet=as_json) as progress, recording() as recorder:
            from reft_ray.finetuning.config import FinetuneConfig
            from reft_ray.finetuning.tracking import tracked
            from reft_ray.pipeline.local_run import LocalRun

            config = FinetuneConfig.of(
                {"base": base, "method": method, **with_precision(precision), **parse_settings(set_)}
            )
            resources = resources_of(workers, gpus_per_worker, cpus_per_worker, strategy, storage)
            rows = alignment_from(alignment, refusals, helpful)
            held = validation_from(validation)
            run = LocalRun(
                config, resources, out, teacher, rows, max_reject_ratio, job_threshold, job_threshold_floor, held
            )
            if resources.workers:
                start_ray(resources)
            progress.phase("screening")
            counts = run.screen(data, progress.update, recorder)
            with tracked(track, run_id or out.name, config.model_dump(), tracks_of(out), progress.note) as follow:
                run.train(run_id, follow, recorder, progress.phase)
        report = {"out": str(out), "method": config.method.value, "rows": counts}
        if as_json:
            print_json(report)
        else:
            typer.echo(f"{out}: {config.method} on {counts['kept']} of {counts['rows']} rows")


def tracks_of(out: Path) -> Path:
    """Where a tracker may keep files of the run that makes `out`."""
    return out.with_name(out.name + ".track")


def alignment_from(
    alignment: Sequence[Path] | None, refusals: Sequence[Path] | None, helpful: Sequence[Path] | None
) -> list[Example]:
    """The alignment rows of the three options."""
    from reft_ray.core.conversation import Label
    from reft_ray.finetuning.prompts import read_labelled

    rows = [row for path in alignment or () for row in read_labelled(path)]
    rows += [row for path in refusals or () for row in read_labelled(path, Label.HARMFUL)]
    return rows + [row for path in helpful or () for row in read_labelled(path, Label.HARMLESS)]


def validation_from(path: Path | None) -> list[Example]:
    """The rows of a validation file that have an answer. Raises UsageError if none has."""
    if path is None:
        return []
    from reft_ray.core.conversation import Label
    from reft_ray.core.errors import UsageError
    from reft_ray.finetuning.prompts import read_labelled

    rows = [row for row in read_labelled(path, Label.HARMLESS) if row.answered]
    if not rows:
        raise UsageError(f"--validation {path}: no row has an answer")
    return rows
