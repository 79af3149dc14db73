"""`reft-ray teacher`: make, measure, recalibrate, check and show a Ref-Teacher."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reft_ray.cli import teacher_measures, teacher_shelf
from reft_ray.cli.common import TEACHER, JsonOption, parse_settings, print_json, recording, user_errors
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
from reft_ray.cli.teacher_rows import (
    BaseOption,
    HoldoutOption,
    LicenceOption,
    OutOption,
    PromptsOption,
    RowFiles,
    SetOption,
    ValidationOption,
)
from reft_ray.teachers import teacher_folder

if TYPE_CHECKING:
    from reft_ray.finetuning.config import Resources, TeacherConfig

app = typer.Typer(help="Prepare and inspect Ref-Teachers.", no_args_is_help=True)


@app.command("train")
def train(
    base: BaseOption,
    prompts: PromptsOption,
    out: OutOption,
    refusals: Annotated[list[Path] | None, typer.Option(help="Refusals to harmful prompts (prompt, response).")] = None,
    helpful: Annotated[list[Path] | None, typer.Option(help="Answers to harmless prompts (prompt, response).")] = None,
    validation: ValidationOption = None,
    holdout_source: HoldoutOption = None,
    licence: LicenceOption = None,
    set_: SetOption = None,
    workers: WorkersOption = None,
    gpus_per_worker: GpusOption = None,
    cpus_per_worker: CpusOption = None,
    strategy: StrategyOption = "data_parallel",
    precision: PrecisionOption = "auto",
    storage: StorageOption = None,
    run_id: Annotated[str | None, typer.Option(help="Name of the run; the same name resumes.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a Ref-Teacher for a base model (stage 1)."""
    with user_errors():
        from reft_ray.finetuning.config import TeacherConfig

        config = TeacherConfig.of({"base": base, **with_precision(precision), **parse_settings(set_)})
        files = RowFiles(prompts, validation, holdout_source, licence, refusals, helpful)
        resources = resources_of(workers, gpus_per_worker, cpus_per_worker, strategy, storage)
        _show(_prepared(config, files, out, resources, run_id, as_json), as_json)


@app.command("build")
def build(
    base: BaseOption,
    prompts: PromptsOption,
    out: OutOption,
    validation: ValidationOption = None,
    holdout_source: HoldoutOption = None,
    licence: LicenceOption = None,
    set_: SetOption = None,
    workers: WorkersOption = None,
    gpus_per_worker: GpusOption = None,
    cpus_per_worker: CpusOption = None,
    strategy: StrategyOption = "data_parallel",
    precision: PrecisionOption = "auto",
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a Ref-Teacher from an aligned model without training, in minutes on a CPU."""
    with user_errors():
        from reft_ray.finetuning.config import TeacherConfig

        fixed = {"base": base, "weights": "none", "feature": "base"}
        config = TeacherConfig.of({**fixed, **with_precision(precision), **parse_settings(set_)})
        files = RowFiles(prompts, validation, holdout_source, licence)
        resources = resources_of(workers, gpus_per_worker, cpus_per_worker, strategy, storage)
        _show(_prepared(config, files, out, resources, None, as_json), as_json)


app.command("evaluate")(teacher_measures.evaluate)
app.command("thresholds")(teacher_measures.thresholds)
app.command("check")(teacher_measures.check)
app.command("install")(teacher_shelf.install)
app.command("rollback")(teacher_shelf.rollback)
app.command("history")(teacher_shelf.history)


@app.command("show")
def show(
    teacher: Annotated[Path, typer.Argument(parser=teacher_folder, metavar="TEACHER", help=TEACHER)],
    as_json: JsonOption = False,
) -> None:
    """Show a Ref-Teacher's model card or manifest."""
    with user_errors():
        _show(teacher, as_json)


def _prepared(
    config: TeacherConfig, files: RowFiles, out: Path, resources: Resources, run_id: str | None, as_json: bool
) -> Path:
    from reft_ray.cli.progress import bar
    from reft_ray.finetuning.trainer import prepare_teacher

    data = files.read(config.seed)
    if resources.workers:
        start_ray(resources)
    with recording() as recorder, bar("Ref-Teacher", quiet=as_json) as progress:

        def show_progress(metrics: Mapping[str, Any]) -> None:
            if stage := metrics.get("stage"):
                done, total = metrics["prompts_done"], metrics["prompts"]
                progress.phase(stage, done / total, f"{done} of {total}")
            else:
                progress.update(metrics)

        made = prepare_teacher(config, data, out, resources, run_id, show_progress, recorder)
    return made.folder


def _show(folder: Path, as_json: bool) -> None:
    import dataclasses

    from reft_ray.hf.ref_teacher import RefTeacher

    teacher = RefTeacher.load(folder)
    if as_json:
        print_json({"id": teacher.id, "folder": str(folder), **dataclasses.asdict(teacher.manifest)})
        return
    typer.echo((folder / "README.md").read_text(encoding="utf-8"))
