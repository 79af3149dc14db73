"""`reft-ray screen`: keep the rows of a dataset that a Ref-Teacher classifies as harmless."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from reft_ray.cli.common import (
    JobThresholdFloorOption,
    JobThresholdOption,
    JsonOption,
    KeyOption,
    TeacherOption,
    print_json,
    recording,
    user_errors,
)
from reft_ray.cli.reading import (
    READING,
    ColumnOption,
    ContainerOption,
    FormatOption,
    SpeakerOption,
    TokenizerOption,
    columns_of,
    named,
    speakers_of,
)
from reft_ray.cli.resources import PrecisionOption, accelerators, default_gpus
from reft_ray.core.errors import BlockedByPolicyError, UsageError
from reft_ray.core.job_threshold import FLOOR

if TYPE_CHECKING:
    from collections.abc import Callable

    from reft_ray.core.cascade import Guard
    from reft_ray.core.scoring import Scorer
    from reft_ray.screening.config import RowCheck, ScorerFactory, ScreenConfig
    from reft_ray.screening.guards import Teacher
    from reft_ray.screening.metrics import ScreeningMetrics
    from reft_ray.screening.report import ScreenReport
    from reft_ray.screening.watching import Seen

CombineName = Literal["any", "all", "majority", "grey-band"]
"""The values of `core.cascade.Combine`, which is imported in the commands."""

DECIDING, GUARD, RUNNING = "Decisions", "Guards", "Execution"


def screen(
    inputs: Annotated[list[str], typer.Argument(help="Files, directories, globs or pyarrow.fs URIs such as s3://...")],
    out: Annotated[str, typer.Option(help="A new directory, or one to resume.")],
    teacher: TeacherOption = None,
    url: Annotated[
        str | None, typer.Option(help="A running service that scores the rows instead, e.g. http://127.0.0.1:8000.")
    ] = None,
    key: KeyOption = "none",
    base: Annotated[
        str | None, typer.Option(help="The base model, if it is not at the path that the teacher records.")
    ] = None,
    row_format: FormatOption = None,
    container: ContainerOption = None,
    column: ColumnOption = None,
    speaker: SpeakerOption = None,
    source_column: Annotated[
        str | None, typer.Option(help="Break the report down by this column.", rich_help_panel=READING)
    ] = None,
    tokenizer: TokenizerOption = None,
    policy: Annotated[
        Literal["filter", "review", "fail"],
        typer.Option(help="Handling of withheld rows.", rich_help_panel=DECIDING),
    ] = "filter",
    max_reject_ratio: Annotated[
        float | None,
        typer.Option(help="Refuse the dataset above this share of withheld rows.", rich_help_panel=DECIDING),
    ] = None,
    review_threshold: Annotated[
        float | None, typer.Option(help="Score above which a row needs review.", rich_help_panel=DECIDING)
    ] = None,
    block_threshold: Annotated[
        float | None, typer.Option(help="Score above which a row is blocked.", rich_help_panel=DECIDING)
    ] = None,
    job_threshold: JobThresholdOption = True,
    job_threshold_floor: JobThresholdFloorOption = FLOOR,
    language: Annotated[
        list[str] | None, typer.Option(help="Languages the teacher covers [default: en].", rich_help_panel=DECIDING)
    ] = None,
    no_finding: Annotated[list[str] | None, typer.Option(help="Findings to omit.", rich_help_panel=DECIDING)] = None,
    findings: Annotated[
        bool, typer.Option(help="Report findings about the whole dataset.", rich_help_panel=DECIDING)
    ] = True,
    guard: Annotated[
        list[str] | None,
        typer.Option(
            help="URL of /v1/moderations, FORMAT:DIRECTORY, FORMAT:URL#MODEL or @FILE.yaml; repeatable.",
            rich_help_panel=GUARD,
        ),
    ] = None,
    guard_combine: Annotated[
        CombineName,
        typer.Option(help="How the verdicts are combined.", rich_help_panel=GUARD),
    ] = "any",
    guard_order: Annotated[
        Literal["after", "before"],
        typer.Option(help="Whether the guards run after or before the teacher.", rich_help_panel=GUARD),
    ] = "after",
    guard_threshold: Annotated[
        float,
        typer.Option(help="A guard's probability of harm above which a row is withheld.", rich_help_panel=GUARD),
    ] = 0.5,
    actors: Annotated[
        int | None,
        typer.Option(
            "--actors",
            "--workers",
            help="Parallel scorers, by default one per GPU of this machine; with --url, parallel requests.",
            rich_help_panel=RUNNING,
        ),
    ] = None,
    gpus: Annotated[
        float | None,
        typer.Option(
            "--gpus",
            "--gpus-per-worker",
            help="GPUs per scorer, fractions allowed; default: one if there is one.",
            rich_help_panel=RUNNING,
        ),
    ] = None,
    cpus: Annotated[
        float, typer.Option("--cpus", "--cpus-per-worker", help="CPUs per scorer.", rich_help_panel=RUNNING)
    ] = 1.0,
    precision: PrecisionOption = "auto",
    small_rows: Annotated[
        int, typer.Option(help="The most rows that are screened without a cluster.", rich_help_panel=RUNNING)
    ] = 10_000,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch", help="Screen files as they appear, each into a directory of its own.", rich_help_panel=RUNNING
        ),
    ] = False,
    every: Annotated[
        float, typer.Option(help="With --watch: seconds between two looks.", rich_help_panel=RUNNING)
    ] = 5.0,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.", rich_help_panel=RUNNING)] = False,
    as_json: JsonOption = False,
) -> None:
    """Screen a dataset: kept rows, withheld rows with evidence, and a report.

    Run it again with the same --out to resume. Exit codes: 0 done, 1 failed, 2 usage, 3 refused by the policy.
    """
    with user_errors():
        from reft_ray.core.cascade import Combine, Order
        from reft_ray.core.verdict import Thresholds
        from reft_ray.rows.format import Format
        from reft_ray.rows.reader import control_tokens_of
        from reft_ray.screening.config import Policy, ScreenConfig
        from reft_ray.screening.dataset import screen as run
        from reft_ray.screening.metrics import ScreeningMetrics
        from reft_ray.screening.report import load_report
        from reft_ray.screening.sources import Container

        if (review_threshold is None) != (block_threshold is None):
            raise UsageError("--review-threshold and --block-threshold must be set together")
        factory = _factory(teacher, base, url, key, precision)
        if gpus is None:
            gpus = 0.0 if url else default_gpus()
        if actors is None:
            actors = max(1, accelerators()) if gpus else 1
        config = ScreenConfig(
            format=named(Format, row_format, "--format"),
            container=named(Container, container, "--container"),
            columns=columns_of(column),
            speakers=speakers_of(speaker),
            row_check=functools.partial(load_check, str(tokenizer)) if tokenizer and tokenizer.is_dir() else None,
            source_column=source_column,
            control_tokens=control_tokens_of(tokenizer) if tokenizer else frozenset(),
            thresholds=_thresholds(Thresholds, review_threshold, block_threshold),
            job_threshold=job_threshold,
            job_threshold_floor=job_threshold_floor,
            guards=_guards(guard, guard_threshold) if guard else None,
            guard_combine=Combine(guard_combine),
            guard_order=Order(guard_order),
            policy=Policy(policy),
            max_reject_ratio=max_reject_ratio,
            languages=frozenset(language or ["en"]),
            findings=findings,
            findings_off=frozenset(no_finding or []),
            small_rows=small_rows,
            actors=actors,
            cpus_per_actor=cpus,
            gpus_per_actor=gpus,
        )
        if url:
            # Each request sends a whole unit, while the next one is read.
            config = replace(config, threads=max(2, actors), batch_rows=config.limits.rows)
        if watch:
            with recording() as recorder:
                _watch(inputs, out, factory, config, every, ScreeningMetrics(recorder))
        refused: BlockedByPolicyError | None = None
        with recording() as recorder, _bar(shown=not (quiet or as_json)) as progress:
            metrics = ScreeningMetrics(recorder)
            try:
                report = run(inputs, out, factory, config, progress, metrics)
            except BlockedByPolicyError as error:
                refused, report = error, load_report(out)
        print_json(report.to_dict()) if as_json else _print(report, config, out)
        if refused:
            raise refused


def _watch(
    inputs: list[str], out: str, factory: ScorerFactory, config: ScreenConfig, every: float, metrics: ScreeningMetrics
) -> NoReturn:
    """Screen files as they appear, until the process is stopped."""
    from reft_ray.screening.watching import watch

    def show(seen: Seen) -> None:
        print(f"{seen.name}: {seen.refused or 'passed'}; {seen.out}", flush=True)

    with contextlib.suppress(KeyboardInterrupt):
        watch(inputs, out, factory, config, show, every=every, metrics=metrics)
    raise typer.Exit


def load_scorer(teacher: str, base: str | None, precision: str = "auto") -> Scorer:
    """The scorer of a teacher on disk; called in every scoring process."""
    from reft_ray.hf.ref_teacher import RefTeacher

    return RefTeacher.load(teacher).scorer(base, precision=precision)


def load_check(base: str) -> RowCheck:
    """The check of rows by a base model's chat template; called in every process that reads rows."""
    from reft_ray.hf.row_check import TemplateCheck

    return TemplateCheck(base)


def remote_teacher(url: str, key: str) -> Teacher:
    """The teacher of a running service."""
    from reft_ray.screening.remote import RemoteTeacher

    return RemoteTeacher(url, key)


def _factory(
    teacher: Path | None, base: str | None, url: str | None, key: str, precision: str = "auto"
) -> ScorerFactory:
    if (teacher is None) == (url is None):
        raise UsageError("name one scorer: --teacher DIRECTORY, or --url of a running service")
    if url is not None:
        if base is not None:
            raise UsageError("--base needs --teacher: a service has its own base model")
        return functools.partial(remote_teacher, url, key)
    if teacher is None or not teacher.is_dir():
        raise UsageError(f"no Ref-Teacher at {teacher}")
    return functools.partial(load_scorer, str(teacher), base, precision)


def _guards(named: list[str], threshold: float) -> Callable[[], list[Guard]]:
    """Called in every scoring process."""
    from reft_ray.guards.settings import CascadeSettings, guard_from, load_guards

    found = CascadeSettings.of({"guards": [guard_from(text, threshold) for text in named]}, "--guard")
    return functools.partial(load_guards, found.guards)


def _thresholds(make: Any, review: float | None, block: float | None) -> Any:
    if review is None:
        return None
    try:
        return make(review, block)
    except ValueError as error:
        raise UsageError(str(error)) from None


@contextmanager
def _bar(shown: bool) -> Iterator[Any]:
    if not shown:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} rows"),
    )
    speed = TextColumn("{task.fields[speed]:,.0f} rows/s")
    console = Console(stderr=True)
    with Progress(*columns, speed, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("Screening", total=None, visible=False, speed=0.0)

        def show(now: Any) -> None:
            speed, title = now.rows_per_second, "Writing" if now.writing else "Screening"
            bar.update(task, completed=now.done, total=now.total, speed=speed, description=title, visible=True)

        yield show


def _print(report: ScreenReport, config: ScreenConfig, out: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from reft_ray.screening.sources import display_name

    console = Console()
    counts = Table(box=None, pad_edge=False)
    for name in ("rows", "kept", "review", "blocked", "invalid"):
        counts.add_column(name, justify="right")
    counts.add_row(*(f"{getattr(report, name):,}" for name in ("rows", "kept", "review", "blocked", "invalid")))
    console.print(counts)
    for reason in report.reasons:
        rows = ", ".join(map(str, reason.first_rows[:8])) + (", ..." if reason.count > 8 else "")
        console.print(f"{reason.code}: {reason.count} (rows {rows})", highlight=False)
    for file in report.files:
        for warning in file.warnings:
            console.print(f"warning: {file.name}: {warning}", highlight=False, markup=False)
    for finding in report.findings:
        console.print(f"{finding.severity} finding {finding.name}: {finding.summary}", highlight=False, markup=False)
    if report.job_threshold:
        console.print(report.job_threshold.summary, highlight=False)
    console.print(f"{report.status_reason}; {display_name(out)}/report.html", highlight=False, markup=False)
    if report.status == "needs_review":
        console.print(f"next: reft-ray review list {display_name(out)}", highlight=False, markup=False)
