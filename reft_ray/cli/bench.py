"""`reft-ray bench`: the comparison with the baselines, and the report made from its cells."""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reft_ray.cli.console import user_errors

if TYPE_CHECKING:
    from reft_ray.experiments.bench.config import BenchConfig

app = typer.Typer(help="Compare the method with its baselines.", no_args_is_help=True)

PresetOption = Annotated[str, typer.Option(help="quick, builtin, small or 8b.")]
RowsOption = Annotated[Path | None, typer.Option(help="Folder of real rows, with data/ and models/.")]
BaseOption = Annotated[str | None, typer.Option(help="Base model: a directory or a hub id.")]
TeacherOption = Annotated[Path | None, typer.Option(help="A finished Ref-Teacher; default: trained once.")]
OutOption = Annotated[Path, typer.Option(help="Where cells and results are kept.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Any BenchConfig key, e.g. evaluation.task=100.")]
SectionOption = Annotated[list[str] | None, typer.Option("--section", help="Only these sections.")]


@app.command()
def run(
    preset: PresetOption = "quick",
    rows: RowsOption = None,
    base: BaseOption = None,
    teacher: TeacherOption = None,
    out: OutOption = Path("out/bench"),
    workers: Annotated[int, typer.Option(help="Cells at a time, as Ray tasks; 0 runs them in this process.")] = 0,
    minutes: Annotated[float | None, typer.Option(help="Start nothing new after so long.")] = None,
    set_: SetOption = None,
    section: SectionOption = None,
) -> None:
    """Make every cell and section that is missing; what was made before is kept, so an interrupted run goes on."""
    with user_errors():
        from reft_ray.core.errors import ReftError
        from reft_ray.experiments.bench.workspace import Workspace

        seconds = math.inf if minutes is None else 60 * minutes
        workspace = Workspace(_config(preset, rows, base, teacher, set_), out, _say, workers, seconds)
        if workers:
            from reft_ray.finetuning.cluster import start_ray

            start_ray(workers)
        for part in _chosen(section or ()):
            if workspace.in_time:
                part.make(workspace)
        if failed := workspace.failures:
            raise ReftError(f"{len(failed)} cells failed, the first: {failed[0]}; the next run tries them again")


@app.command()
def table(
    preset: PresetOption = "quick",
    rows: RowsOption = None,
    base: BaseOption = None,
    teacher: TeacherOption = None,
    out: OutOption = Path("out/bench"),
    markdown: Annotated[Path, typer.Option(help="The report; pictures go to a folder of its name.")] = Path(
        "docs/results.md"
    ),
    set_: SetOption = None,
    section: SectionOption = None,
) -> None:
    """Write the report from what was made so far."""
    with user_errors():
        from reft_ray.experiments.bench.report import write_results
        from reft_ray.experiments.bench.workspace import Workspace

        workspace = Workspace(_config(preset, rows, base, teacher, set_), out, _say)
        missing = write_results(workspace, _chosen(section or ()), markdown, _command(preset, rows, base, set_))
        typer.echo(f"{markdown}" + (f"; not made yet: {', '.join(missing)}" if missing else ""))


def _config(
    preset: str, rows: Path | None, base: str | None, teacher: Path | None, set_: list[str] | None
) -> BenchConfig:
    from reft_ray.cli.settings import parsed
    from reft_ray.experiments.bench.presets import preset as preset_of
    from reft_ray.experiments.bench.sections import check_settings

    named = {"rows": rows, "base": base, "teacher": teacher}
    config = preset_of(preset, {**{key: str(value) for key, value in named.items() if value}, **parsed(set_)})
    check_settings(config.sections)
    return config


def _chosen(names: Sequence[str]) -> list[Any]:
    from reft_ray.core.errors import UsageError
    from reft_ray.experiments.bench.sections import sections

    known = {part.name: part for part in sections()}
    for name in names:
        if name not in known:
            raise UsageError(f"no section {name!r}; there are {', '.join(known)}")
    return [known[name] for name in names or known]


def _command(preset: str, rows: Path | None, base: str | None, set_: list[str] | None) -> str:
    """The command that makes these results again; paths of this machine's own are left to the reader."""
    words = ["reft-ray", "bench", "run", "--preset", preset]
    words += ["--rows", "DIR"] if rows else []
    words += ["--base", "BASE"] if base else []
    for setting in set_ or ():
        words += ["--set", setting]
    return shlex.join(words)


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)
