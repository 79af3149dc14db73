"""`reft-ray quickstart`: the whole method on this machine, in minutes."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from reft_ray.cli.common import JsonOption, print_json, user_errors


def quickstart(
    out: Annotated[Path, typer.Option(help="Directory of the report, the teacher and the students.")] = Path(
        "out/quickstart"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the synthetic rows and of all training.")] = 0,
    workers: Annotated[int, typer.Option(help="Ray Train workers of each student.")] = 1,
    cache: Annotated[Path | None, typer.Option(help="Directory of the built-in base model.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Poison a dataset, finetune with and without the Ref-Teacher, and compare: offline, on CPU."""
    with user_errors():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        from reft_ray.experiments.quickstart import Plan, run_quickstart
        from reft_ray.experiments.report import table_of
        from reft_ray.hf.model_store import cache_root
        from reft_ray.local_ray import ensure_training_ray

        console = Console(stderr=True)
        plain = not console.is_terminal
        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        ensure_training_ray()
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

            report = run_quickstart(out, cache or cache_root(), show, Plan(seed), workers)
        if as_json:
            print_json(report)
            return
        console = Console()
        console.print(table_of(report["methods"]))
        quality = report["filter"]
        console.print(
            "HS: harmful prompts answered; FA: task rows answered correctly; over-refusal: harmless prompts refused; "
            "look-alikes: those among them that resemble harmful ones. In %, with 95 % intervals."
        )
        console.print(
            f"filter: AUROC {quality['auroc']:.4f}, {quality['recall']:.2%} of harmful and {quality['fpr']:.2%} of "
            f"harmless rows dropped; {report['seconds_total']:.0f} s in total"
        )
        console.print(f"report: {out / 'report.html'}")


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(0, round(seconds / 5) * 5)} s"
