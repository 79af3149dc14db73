"""`reft-ray adapter`: merge a finished adapter into its base, describe it, publish it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reft_ray.cli.common import JsonOption, print_json, user_errors

app = typer.Typer(help="Merge, describe and publish finished adapters.", no_args_is_help=True)

Adapter = Annotated[Path, typer.Argument(help="Directory of a finished adapter.")]


@app.command("merge")
def merge(
    adapter: Adapter,
    out: Annotated[Path, typer.Option(help="Directory of the merged model.")],
    base: Annotated[str | None, typer.Option(help="Base model; default: the one that the adapter names.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; the sum is taken in float32.")] = "bfloat16",
    as_json: JsonOption = False,
) -> None:
    """Write base model + adapter as one model, for servers without LoRA."""
    with user_errors():
        from reft_ray.hf.adapter_tools import merge_adapter

        name = merge_adapter(adapter, out, base, dtype)
        if as_json:
            print_json({"out": str(out), "base": name, "dtype": dtype})
        else:
            typer.echo(f"{out}: {name} with {adapter}, {dtype}")


@app.command("card")
def card(
    adapter: Adapter,
    measures: Annotated[Path | None, typer.Option(help="A report of `reft-ray eval --json`.")] = None,
    licence: Annotated[str | None, typer.Option(help="Licence of the adapter, e.g. llama3.1.")] = None,
) -> None:
    """Write the model card (README.md) of an adapter."""
    with user_errors():
        typer.echo(_write_card(adapter, measures, licence))


@app.command("push")
def push(
    adapter: Adapter,
    target: Annotated[str, typer.Argument(help="A hub repository, owner/name, or a pyarrow.fs URI, e.g. s3://...")],
    public: Annotated[bool, typer.Option("--public", help="A new hub repository is public; default: private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch of the hub repository; default: its main one.")] = None,
) -> None:
    """Publish an adapter with tokenizer and card, and no other file of its directory. The hub's token is HF_TOKEN."""
    with user_errors():
        import shutil
        import tempfile

        from reft_ray.hf.adapter_tools import CARD, files_to_publish, push_to_hub

        names = files_to_publish(adapter)
        if CARD not in names:
            _write_card(adapter, None, None)
        if "://" not in target:
            typer.echo(push_to_hub(adapter, target, not public, revision))
            return
        from reft_ray.jobs.artefacts import put_folder

        with tempfile.TemporaryDirectory(prefix="reft-push-") as scratch:
            for name in files_to_publish(adapter):
                shutil.copy(adapter / name, scratch)
            typer.echo(put_folder(Path(scratch), target))


def _write_card(adapter: Path, measures: Path | None, licence: str | None) -> Path:
    import json

    from reft_ray.core.errors import UsageError
    from reft_ray.hf.adapter_tools import write_card

    report = None
    if measures is not None:
        try:
            report = json.loads(measures.read_text(encoding="utf-8"))
        except ValueError:
            raise UsageError(f"{measures} is not a report of `reft-ray eval --json`") from None
    return write_card(adapter, report, licence)
