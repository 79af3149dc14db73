"""`reft-ray teacher`: train, evaluate and show a Ref-Teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from reft_ray.cli.common import JsonOption, parse_settings, print_json, recording, user_errors

app = typer.Typer(help="Prepare and inspect Ref-Teachers.", no_args_is_help=True)


@app.command("train")
def train(
    base: Annotated[str, typer.Option(help="Base model: a directory or a hub id.")],
    prompts: Annotated[list[Path], typer.Option(help="Labelled prompts, JSONL (prompt, label, source, response?).")],
    out: Annotated[Path, typer.Option(help="Directory of the artefact.")],
    refusals: Annotated[list[Path] | None, typer.Option(help="Refusals to harmful prompts (prompt, response).")] = None,
    helpful: Annotated[list[Path] | None, typer.Option(help="Answers to harmless prompts (prompt, response).")] = None,
    validation: Annotated[
        list[Path] | None,
        typer.Option(help="Labelled prompts of other sources; they choose layer, early stop and thresholds."),
    ] = None,
    holdout_source: Annotated[
        list[str] | None, typer.Option(help="Sources of --prompts to use for validation instead of training.")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any TeacherConfig key, e.g. epochs=2.")] = None,
    workers: Annotated[int, typer.Option(help="Ray Train workers; 0 trains in this process.")] = 0,
    run_id: Annotated[str | None, typer.Option(help="Name of the run; the same name resumes.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a Ref-Teacher for a base model (stage 1)."""
    with user_errors():
        from reft_ray.cli.progress import bar
        from reft_ray.core.conversation import Label
        from reft_ray.finetuning.config import Resources, TeacherConfig
        from reft_ray.finetuning.prompts import (
            hold_out_rows,
            hold_out_sources,
            join_answers,
            read_labelled,
            without_prompts_of,
        )
        from reft_ray.finetuning.teacher_loop import TeacherData
        from reft_ray.finetuning.trainer import prepare_teacher
        from reft_ray.local_ray import ensure_training_ray

        config = TeacherConfig.of({"base": base, **parse_settings(set_)})
        rows = [row for path in prompts for row in read_labelled(path)]
        answers = [row for path in refusals or () for row in read_labelled(path, Label.HARMFUL)]
        answers += [row for path in helpful or () for row in read_labelled(path, Label.HARMLESS)]
        rows, answers = join_answers(rows, answers)
        if validation:
            held = [row for path in validation for row in read_labelled(path)]
        elif holdout_source:
            rows, held = hold_out_sources(rows, holdout_source)
            answers = [row for row in answers if row.source not in holdout_source]
        else:
            typer.echo(
                "note: no --validation and no --holdout-source: a tenth of the rows is used for validation", err=True
            )
            rows, held = hold_out_rows(rows, seed=config.seed)
        train, answers = without_prompts_of(rows, held), without_prompts_of(answers, held)
        if len(train) < len(rows):
            typer.echo(
                f"note: {len(rows) - len(train)} rows are skipped, because their prompts are validation prompts",
                err=True,
            )
        if workers:
            ensure_training_ray()
        with recording() as recorder, bar("Ref-Teacher", quiet=as_json) as progress:
            made = prepare_teacher(
                config,
                TeacherData(train, held, answers),
                out,
                Resources(workers=workers),
                run_id,
                progress.update,
                recorder,
            )
        _show(made.folder, as_json)


@app.command("evaluate")
def evaluate(
    teacher: Annotated[Path, typer.Option(help="Directory of the artefact.")],
    prompts: Annotated[list[Path], typer.Option(help="Labelled prompts, JSONL.")],
    base: Annotated[str | None, typer.Option(help="The base model, if it moved.")] = None,
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure a Ref-Teacher's filter: AUROC, AUPRC, recall at 1 % FPR, per source and overall."""
    with user_errors():
        from reft_ray.finetuning.prompts import check_labels, read_labelled
        from reft_ray.finetuning.teacher_quality import measure
        from reft_ray.hf.ref_teacher import RefTeacher

        rows = [row for path in prompts for row in read_labelled(path)]
        check_labels(rows, "labelled")
        report = measure(RefTeacher.load(teacher).scorer(base, precision=precision), rows)
        if as_json:
            print_json(report)
            return
        _print_quality(report)


@app.command("show")
def show(
    teacher: Annotated[Path, typer.Argument(help="Directory of the artefact.")], as_json: JsonOption = False
) -> None:
    """Show a Ref-Teacher's model card or manifest."""
    with user_errors():
        _show(teacher, as_json)


def _show(folder: Path, as_json: bool) -> None:
    import dataclasses

    from reft_ray.hf.ref_teacher import RefTeacher

    teacher = RefTeacher.load(folder)
    if as_json:
        print_json({"id": teacher.id, "folder": str(folder), **dataclasses.asdict(teacher.manifest)})
        return
    typer.echo((folder / "README.md").read_text(encoding="utf-8"))


def _print_quality(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("source", "rows", "harmful", "AUROC", "AUPRC", "recall at 1 % FPR", "blocked")
    for name, row in [("overall", report["overall"]), *sorted(report["sources"].items())]:
        figures = [row["auroc"], row["auprc"], row["recall_at_1_fpr"], row["blocked"]]
        table.add_row(name, str(row["rows"]), str(row["harmful"]), *(f"{value:.3f}" for value in figures))
    Console().print(table)
    Console().print("A source with one label is ranked against all rows of the other label.", style="dim")
