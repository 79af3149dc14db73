"""`reft-ray files`: files of a running service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reft_ray.atomic import atomic_write
from reft_ray.cli.common import DEFAULT_URL, JsonOption, KeyOption, UrlOption, print_json, running_service
from reft_ray.core.errors import UsageError

app = typer.Typer(no_args_is_help=True, help="Upload, list, fetch and delete files of a running service.")

FileArgument = Annotated[str, typer.Argument(help="The file's id, file-...")]


@app.command()
def upload(
    path: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A file of rows.")],
    purpose: Annotated[str, typer.Option(help="Purpose of the file.")] = "fine-tune",
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "none",
    as_json: JsonOption = False,
) -> None:
    """Upload a file and print its id."""
    with running_service(url, key) as service, path.open("rb") as content:
        made = service.post("/files", data={"purpose": purpose}, files={"file": (path.name, content)})
        print_json(made) if as_json else print(made["id"])


@app.command("list")
def list_files(
    purpose: Annotated[str | None, typer.Option(help="Only files for this purpose.")] = None,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "none",
    as_json: JsonOption = False,
) -> None:
    """List the project's files, newest first."""
    with running_service(url, key) as service:
        files = list(service.pages("/files", purpose=purpose))
        if as_json:
            print_json(files)
            return
        for file in files:
            print(f"{file['id']}  {file['bytes']:>12,}  {file['purpose']}  {file['filename']}")


@app.command()
def get(
    file: FileArgument,
    out: Annotated[Path, typer.Option(help="A new file.")],
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "none",
) -> None:
    """Fetch a file's content."""
    with running_service(url, key) as service:
        if out.exists():
            raise UsageError(f"{out} exists; name a new file")
        with atomic_write(out) as part, part.open("wb") as target:
            for chunk in service.download(f"/files/{file}/content"):
                target.write(chunk)


@app.command()
def erase(
    subject: Annotated[str, typer.Argument(help="A text that every row of a person has, such as an address.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count the rows.")] = False,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "none",
    as_json: JsonOption = False,
) -> None:
    """Erase a person's rows from all files of the project; names the models that were trained on them."""
    with running_service(url, key) as service:
        found = service.post("/erasures", json={"subject": subject, "dry_run": dry_run})
        if as_json:
            print_json(found)
            return
        print(f"{found['rows']} rows {'found' if dry_run else 'erased'} in {len(found['files'])} files")
        for file in found["files"]:
            print(f"{file['id']}  {file['rows']:>8,}")
        for name, ids in (("not JSONL, look yourself", found["unread"]), ("trained on them", found["models"])):
            if ids:
                print(f"{name}: {', '.join(ids)}")


@app.command()
def delete(file: FileArgument, url: UrlOption = DEFAULT_URL, key: KeyOption = "none") -> None:
    """Delete a file and everything derived from it."""
    with running_service(url, key) as service:
        print(f"{service.delete(f'/files/{file}')['id']} is deleted")
