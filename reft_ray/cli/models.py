"""`reft-ray models`: the language models that the project knows by name."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from reft_ray.cli.common import JsonOption, print_json, user_errors

app = typer.Typer(help="Fetch and list the models that are known by name.", no_args_is_help=True)


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
