"""`reft-ray evidence`: the dossier of a job, for an auditor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reft_ray.cli.common import DEFAULT_DATABASE, DatabaseOption, JsonOption, open_database, print_json, user_errors


def evidence(
    job: Annotated[str, typer.Argument(help="The job's id, ftjob-...")],
    out: Annotated[Path, typer.Option(help="A new directory.")],
    files: Annotated[str, typer.Option(help="Where the service keeps files: `files_uri`.")] = "state/files",
    database: DatabaseOption = DEFAULT_DATABASE,
    as_json: JsonOption = False,
) -> None:
    """Write everything about a job that an auditor needs, without text of rows; exit code 1 if the log is broken."""
    with user_errors(), open_database(database) as records:
        from reft_ray.jobs.content import ContentStore
        from reft_ray.jobs.evidence import write_dossier
        from reft_ray.jobs.files import FileStore
        from reft_ray.jobs.job_store import JobStore

        index = write_dossier(JobStore(records), FileStore(records, ContentStore(files)), job, out)
        if as_json:
            print_json(index)
        else:
            fault = index["audit"]["fault"]
            chain = f"broken: {fault}" if fault else f"{index['audit']['entries']} entries, none changed"
            print(f"{len(index['files'])} files in {out}; audit log: {chain}")
        if index["audit"]["fault"]:
            raise typer.Exit(1)
