"""`reft-ray bench`: the comparison with the baselines, and its report."""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reft_ray.cli.common import TeacherOption, parse_settings, user_errors
from reft_ray.cli.resources import GpusOption, PrecisionOption

if TYPE_CHECKING:
    from reft_ray.experiments.bench.config import BenchConfig

app = typer.Typer(help="Compare the method with its baselines.", no_args_is_help=True)

PresetOption = Annotated[str, typer.Option(help="quick, builtin, small, smollm2, gemma or 8b.")]
RowsOption = Annotated[Path | None, typer.Option(help="Folder of real rows, with data/ and models/.")]
BaseOption = Annotated[str | None, typer.Option(help="Base model: a directory or a hub id.")]
OutOption = Annotated[Path, typer.Option(help="Directory of cells and results.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Any BenchConfig key, e.g. evaluation.task=100.")]
SectionOption = Annotated[list[str] | None, typer.Option("--section", help="Only these sections.")]


@app.command()
def run(
    preset: PresetOption = "quick",
    rows: RowsOption = None,
    base: BaseOption = None,
    teacher: TeacherOption = None,
    out: OutOption = Path("out/bench"),
    workers: Annotated[int, typer.Option(help="Cells in parallel, as Ray tasks; 0 runs them in this process.")] = 0,
    gpus_per_worker: GpusOption = None,
    precision: PrecisionOption = "auto",
    minutes: Annotated[float | None, typer.Option(help="Start no new cell or section after this time.")] = None,
    set_: SetOption = None,
    section: SectionOption = None,
) -> None:
    """Compute all cells and sections that are not cached; an interrupted run resumes."""
    with user_errors():
        from reft_ray.core.errors import ReftError
        from reft_ray.experiments.bench.workspace import Workspace

        seconds = math.inf if minutes is None else 60 * minutes
        chosen = ["device=cuda"] if gpus_per_worker else []
        if precision != "auto":
            chosen += [f"{stage}.precision={precision}" for stage in ("student", "teacher_settings")]
        workspace = Workspace(
            _config(preset, rows, base, teacher, [*chosen, *(set_ or [])]), out, _log, workers, seconds
        )
        if workers:
            from reft_ray.local_ray import ensure_training_ray

            ensure_training_ray(workers)
        for part in _chosen(section or ()):
            if workspace.has_time:
                part.make(workspace)
        if failed := workspace.failures:
            raise ReftError(f"{len(failed)} cells failed, the first: {failed[0]}; run again to retry them")


@app.command()
def table(
    preset: PresetOption = "quick",
    rows: RowsOption = None,
    base: BaseOption = None,
    teacher: TeacherOption = None,
    out: OutOption = Path("out/bench"),
    markdown: Annotated[Path, typer.Option(help="The report; pictures go to a folder with its name.")] = Path(
        "out/results.md"
    ),
    set_: SetOption = None,
    section: SectionOption = None,
) -> None:
    """Write the tables of all cached results as Markdown."""
    with user_errors():
        from reft_ray.experiments.bench.workspace import Workspace
        from reft_ray.experiments.sections import write_results

        workspace = Workspace(_config(preset, rows, base, teacher, set_), out, _log)
        missing = write_results(workspace, _chosen(section or ()), markdown, _command(preset, rows, base, set_))
        typer.echo(f"{markdown}" + (f"; not computed yet: {', '.join(missing)}" if missing else ""))


def _config(
    preset: str, rows: Path | None, base: str | None, teacher: Path | None, set_: list[str] | None
) -> BenchConfig:
    from reft_ray.experiments.bench.presets import preset as preset_of
    from reft_ray.experiments.sections import check_settings

    named = {"rows": rows, "base": base, "teacher": teacher}
    config = preset_of(preset, {**{key: str(value) for key, value in named.items() if value}, **parse_settings(set_)})
    check_settings(config.sections)
    return config


def _chosen(names: Sequence[str]) -> list[Any]:
    from reft_ray.core.errors import UsageError
    from reft_ray.experiments.sections import SECTIONS

    for name in names:
        if name not in SECTIONS:
            raise UsageError(f"no section {name!r}; there are {', '.join(SECTIONS)}")
    return [SECTIONS[name] for name in names or SECTIONS]


def _command(preset: str, rows: Path | None, base: str | None, set_: list[str] | None) -> str:
    """The command that reproduces the results, with placeholders for local paths."""
    words = ["reft-ray", "bench", "run", "--preset", preset]
    words += ["--rows", "DIR"] if rows else []
    words += ["--base", "BASE"] if base else []
    for setting in set_ or ():
        words += ["--set", setting]
    return shlex.join(words)


def _log(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)
