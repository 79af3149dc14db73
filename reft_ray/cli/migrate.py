"""`reft-ray migrate`: move an organisation's finetuning here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from reft_ray.cli.common import JsonOption, print_json, user_errors

app = typer.Typer(no_args_is_help=True, help="Move finetuning files and jobs from another provider.")


@app.callback()
def _group() -> None:
    """A group with one command, so that its name is said."""


@app.command("openai")
def openai(
    out: Annotated[Path, typer.Option(help="A directory for the files and the record; the same one resumes.")],
    model: Annotated[
        list[str] | None, typer.Option(help="THEIRS=OURS, or OURS for all other models; repeatable.")
    ] = None,
    source: Annotated[str, typer.Option("--from", help="The API to read from.")] = "https://api.openai.com/v1",
    source_key: Annotated[str, typer.Option(help="Its key as env:NAME.")] = "env:OPENAI_API_KEY",
    url: Annotated[str | None, typer.Option(help="A running service: the files are screened there.")] = None,
    key: Annotated[str, typer.Option(envvar="REFT_API_KEY", help="The key of that service.")] = "none",
    run: Annotated[bool, typer.Option("--run", help="Also create the jobs at --url.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List and download files and jobs, validate and screen the files, and name what is different here.

    Nothing runs without --run. Run it again to resume. Exit codes: 0 done, 1 failed, 2 usage.
    """
    with user_errors():
        from reft_ray.core.errors import UsageError
        from reft_ray.evaluation.endpoint import key_of
        from reft_ray.migrate.migration import Migration
        from reft_ray.migrate.source import OpenAISource

        if run and not (url and model):
            raise UsageError("--run needs the service's --url and a --model")
        models = dict((text if "=" in text else f"*={text}").split("=", 1) for text in model or [])
        migration = Migration(out, lambda line: None if as_json else typer.echo(line))
        with OpenAISource(source, str(key_of(source_key, "source"))) as reader:
            migration.read(reader)
        migration.plan(models)
        if url:
            migration.screen(url, key)
            if run:
                migration.run(url, key)
        print_json(migration.record) if as_json else _print(migration.record)


def _print(record: dict[str, Any]) -> None:
    for job_id, job in record["jobs"].items():
        state = job.get("created") or job.get("error") or ("ready" if job["plan"]["body"] else "cannot run here")
        typer.echo(f"{job_id} ({job['source']['status']}): {state}")
        for found in job["plan"]["deviations"]:
            typer.echo(f"  {found['field']}: {found['message']}")
