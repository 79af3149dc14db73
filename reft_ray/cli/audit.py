"""`reft-ray audit`: read the audit log and verify that it is complete. `reft-ray evidence`: the dossier of a job."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from reft_ray.cli.common import (
    DEFAULT_DATABASE,
    DEFAULT_URL,
    DatabaseOption,
    JsonOption,
    KeyOption,
    UrlOption,
    open_database,
    print_json,
    user_errors,
)
from reft_ray.cli.remote_review import review_client

app = typer.Typer(no_args_is_help=True, help="Read and verify the audit log.")


@app.command()
def verify(
    head: Annotated[
        str | None, typer.Option(help="The head of an earlier verification; it must still be in the chain.")
    ] = None,
    heads: Annotated[
        str | None, typer.Option(help="Where the service keeps signed heads; the newest must be in the chain.")
    ] = None,
    key: Annotated[str | None, typer.Option(help="The PEM file of their key, private or public.")] = None,
    database: DatabaseOption = DEFAULT_DATABASE,
    as_json: JsonOption = False,
) -> None:
    """Recompute the hash chain; exit code 1 if an entry was changed or removed."""
    with user_errors(), open_database(database) as records:
        from dataclasses import asdict

        from reft_ray.core.errors import UsageError
        from reft_ray.jobs.audit import AuditLog
        from reft_ray.jobs.audit_heads import AuditHeads

        if heads is not None:
            if key is None or not Path(key).is_file() or head is not None:
                raise UsageError("--heads needs the existing key file of --key, and takes the place of --head")
            newest = AuditHeads(heads, key).newest()
            head = None if newest is None else newest.head
        result = AuditLog(records).verify(head)
        if as_json:
            print_json({"database": records.name, **asdict(result)})
        elif result.fault is None:
            print(f"{result.entries} entries, none changed, in {records.name}. Head: {result.head}")
        else:
            print(
                f"The audit log in {records.name} is broken: {result.fault}. "
                f"The {result.entries} entries before it are intact."
            )
        if result.fault is not None:
            raise typer.Exit(1)


@app.command("list")
def list_entries(
    after: Annotated[int, typer.Option(min=0, help="Only entries after this number.")] = 0,
    limit: Annotated[int, typer.Option(min=1, help="The most entries to print.")] = 100,
    database: DatabaseOption = DEFAULT_DATABASE,
    as_json: JsonOption = False,
) -> None:
    """Print entries, oldest first."""
    with user_errors(), open_database(database) as records:
        from dataclasses import asdict

        from reft_ray.jobs.audit import AuditLog

        entries = AuditLog(records).entries(after, limit)
        if as_json:
            print_json([asdict(entry) for entry in entries])
            return
        for entry in entries:
            actor = entry.actor.get("api_key", entry.actor.get("session", {}))
            who = actor.get("id") or actor.get("user") or "unknown"
            print(f"{entry.seq}  {entry.effective_at:.0f}  {entry.type}  {who}  {entry.project_id}  {dict(entry.data)}")
        print(f"{len(entries)} entries in {records.name}", file=sys.stderr)


@app.command()
def fetch(
    after: Annotated[int, typer.Option(min=0, help="Only entries after this number.")] = 0,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="The most entries to print.")] = 100,
    kind: Annotated[str | None, typer.Option("--type", help="Only this type, such as review.approved.")] = None,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "none",
) -> None:
    """Print entries of a running service as JSON lines, with a key of a lead, an operator or an auditor."""
    with review_client(url, key) as client:
        for entry in client.audit(after, limit, type=kind):
            print(json.dumps(entry, ensure_ascii=False))
        verification = client.verify_audit()
        state = f"broken: {verification['fault']}" if verification["fault"] else "intact"
        print(f"the chain of {verification['entries']} entries is {state}", file=sys.stderr)
        if verification["fault"]:
            raise typer.Exit(1)


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
