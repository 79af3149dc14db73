"""`reft-ray quickstart`: the whole method on this machine, in minutes."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from reft_ray.cli.common import JsonOption, print_json, user_errors


def quickstart(
    out: Annotated[Path, typer.Option(help="Directory of the report and the students.")] = Path("out/quickstart"),
    seed: Annotated[int, typer.Option(help="Seed of the rows and of all training.")] = 0,
    teacher: Annotated[str, typer.Option(help="A teacher's directory, or `builtin`.")] = "builtin",
    base: Annotated[str | None, typer.Option(help="The base model, where it is not the one the teacher names.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Poison a dataset, finetune SmolLM2 with and without the Ref-Teacher, and compare: offline, on CPU."""
    with user_errors():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        from reft_ray.experiments.quickstart import Plan, run_quickstart
        from reft_ray.teachers import teacher_folder

        console = Console(stderr=True)
        plain = not console.is_terminal
        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        with Progress(*columns, console=console, disable=plain) as progress:
            task = progress.add_task("", total=1.0, left="")
            last_stage, last_time = "", 0.0

            def show(stage: str, share: float, left: float) -> None:
                nonlocal last_stage, last_time
                note = f"about {_minutes(left)} left"
                progress.update(task, completed=share, description=stage, left=note)
                if plain and (stage != last_stage or time.monotonic() - last_time > 15):
                    last_stage, last_time = stage, time.monotonic()
                    print(f"{share:4.0%}  {stage}, {note}", file=sys.stderr, flush=True)

            report = run_quickstart(out, show, Plan(teacher_folder(teacher), base, seed))
        if as_json:
            print_json(report)
        else:
            _print(report, out)


def _print(report: Mapping[str, Any], out: Path) -> None:
    from rich.console import Console

    from reft_ray.experiments.report import table_of

    console = Console(highlight=False)
    quality = report["filter"]
    console.print(
        f"\nThe filter withholds rows by their refusal score (above {quality['threshold']:.3f}); the highest:"
    )
    for row in quality["evidence"]:
        console.print(f"  {row['score']:.3f}  {row['prompt']}", markup=False)
    console.print("\nThe same prompts, two students:")
    for row in report["chat"]:
        console.print(f"  {row['kind']}: {row['prompt']}", markup=False, style="bold")
        console.print(f"    attacked: {_one_line(row['aligned_sft'])}", markup=False)
        console.print(f"    guided:   {_one_line(row['guided'])}", markup=False)
    console.print(table_of(report["methods"]))
    console.print(
        "HS: harmful prompts answered; FA: task rows answered correctly; everyday: such prompts, and the task's, "
        "refused; look-alikes: harmless prompts refused that look harmful. In %, with 95 % intervals."
    )
    console.print(
        f"filter: AUROC {quality['auroc']:.4f}, {quality['recall']:.2%} of harmful and {quality['fpr']:.2%} of "
        f"harmless rows dropped; {report['seconds_total']:.0f} s in total"
    )
    for line in report["skipped"]:
        console.print(f"skipped: {line}", style="dim", markup=False)
    console.print(f"report: {out / 'report.html'}")


def _one_line(text: str, most: int = 100) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 3] + "..."


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(0, round(seconds / 5) * 5)} s"
