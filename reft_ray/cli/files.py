"""`reft-ray files`: the files of a running service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reft_ray.cli.console import JsonOption, print_json, user_errors
from reft_ray.cli.store import DEFAULT_URL, KeyOption, UrlOption

app = typer.Typer(no_args_is_help=True, help="Upload, list, fetch and delete files of a running service.")

FileArgument = Annotated[str, typer.Argument(help="The file's id, file-...")]


@app.command()
def upload(
    path: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A file of rows.")],
    purpose: Annotated[str, typer.Option(help="What the file is for.")] = "fine-tune",
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "none",
    as_json: JsonOption = False,
) -> None:
    """Upload a file and print its id."""
    with user_errors(), path.open("rb") as content:
        from reft_ray.cli.remote import Remote

        with Remote(url, key) as remote:
            made = remote.post("/files", data={"purpose": purpose}, files={"file": (path.name, content)})
        print_json(made) if as_json else print(made["id"])


@app.command("list")
def list_files(
    purpose: Annotated[str | None, typer.Option(help="Only files for this purpose.")] = None,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "none",
    as_json: JsonOption = False,
) -> None:
    """List the project's files, newest first."""
    with user_errors():
        from reft_ray.cli.remote import Remote

        with Remote(url, key) as remote:
            files = list(remote.pages("/files", purpose=purpose))
        if as_json:
            print_json(files)
            return
        for file in files:
            print(f"{file['id']}  {file['bytes']:>12,}  {file['purpose']}  {file['filename']}")


@app.command()
def get(
    file: FileArgument,
    out: Annotated[Path, typer.Option(help="Where to write it; never over a file that is there.")],
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "none",
) -> None:
    """Fetch a file's content."""
    with user_errors():
        from reft_ray.cli.remote import Remote
        from reft_ray.core.errors import UsageError

        if out.exists():
            raise UsageError(f"{out} is there already; name another file")
        part = out.with_name(out.name + ".part")
        try:
            with Remote(url, key) as remote, part.open("wb") as target:
                for chunk in remote.download(f"/files/{file}/content"):
                    target.write(chunk)
            part.rename(out)
        finally:
            part.unlink(missing_ok=True)


@app.command()
def delete(file: FileArgument, url: UrlOption = DEFAULT_URL, key: KeyOption = "none") -> None:
    """Delete a file and everything that was made from it."""
    with user_errors():
        from reft_ray.cli.remote import Remote

        with Remote(url, key) as remote:
            print(f"{remote.delete(f'/files/{file}')['id']} is deleted")
