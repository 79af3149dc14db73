"""`reft-ray validate`: every error of training files, without a model, and a repaired copy."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Annotated

import typer

from reft_ray.cli.common import JsonOption, print_json, user_errors
from reft_ray.cli.reading import (
    ColumnOption,
    ContainerOption,
    FormatOption,
    SpeakerOption,
    columns_of,
    named,
    speakers_of,
)
from reft_ray.core.errors import ReftError, UsageError


def validate(
    files: Annotated[list[str], typer.Argument(help="Files, directories, globs or URIs.")],
    row_format: FormatOption = None,
    container: ContainerOption = None,
    column: ColumnOption = None,
    speaker: SpeakerOption = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json whose control tokens make a row invalid.")
    ] = None,
    fix: Annotated[bool, typer.Option("--fix", help="Write a repaired copy, by repairs that lose no text.")] = False,
    out: Annotated[Path | None, typer.Option(help="The copy [default: NAME.fixed.jsonl, or .csv].")] = None,
    encoding: Annotated[
        str | None, typer.Option(help="With --fix: the encoding of a file that is not UTF-8, e.g. cp1252.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Show at most this many invalid rows; 0 for all.")] = 100,
    workers: Annotated[int | None, typer.Option(help="Processes [default: one for each CPU].")] = None,
    as_json: JsonOption = False,
) -> None:
    """Name every error of the files with its line.

    Exit codes: 0 all rows can be trained on, 1 some cannot, 2 a file cannot be read.
    """
    with user_errors():
        from reft_ray.rows.format import Format
        from reft_ray.rows.reader import RowReader, control_tokens_of
        from reft_ray.screening.sources import Container, find_sources
        from reft_ray.screening.validation import Validated, validate_source

        if (out or encoding) and not fix:
            raise UsageError("--out and --encoding belong to --fix")
        if fix:
            files = [_fixed(Path(file), out, encoding, as_json) for file in files]
        reader = RowReader(
            named(Format, row_format, "--format"),
            columns_of(column),
            control_tokens_of(tokenizer) if tokenizer else (),
            speakers=speakers_of(speaker),
        )
        documents, invalid = [], 0
        for source in find_sources(files, named(Container, container, "--container")):
            total, start, shown = Validated(), time.perf_counter(), []
            found = validate_source(source, reader, total, workers)
            for line, faults in itertools.islice(found, limit or None):
                if as_json:
                    shown.append({"line": line, "errors": [fault._asdict() for fault in faults]})
                else:
                    for fault in faults:
                        print(f"{source.name}:{line}: {fault.code}: {fault}")
            for _ in found:
                pass
            seconds = time.perf_counter() - start
            invalid += total.invalid
            if as_json:
                counts = {"rows": total.rows, "invalid": total.invalid, "codes": dict(total.codes)}
                documents.append({"file": source.name, "format": str(total.format), **counts, "lines": shown})
                continue
            codes = "".join(f"; {code}: {count:,}" for code, count in total.codes.most_common())
            speed = total.size / 1e6 / max(seconds, 1e-9)
            print(
                f"{source.name}: {total.rows:,} rows of the format {total.format}, {total.invalid:,} invalid{codes} "
                f"({seconds:.1f} s, {speed:.0f} MB/s)"
            )
        if as_json:
            print_json(documents)
        if invalid:
            raise ReftError(f"{invalid:,} rows are invalid")


def _fixed(path: Path, out: Path | None, encoding: str | None, quiet: bool) -> str:
    from reft_ray.screening.validation import fix_file

    inner = path.with_suffix("") if path.suffix in (".gz", ".zst") else path
    suffix = inner.suffix if inner.suffix in (".csv", ".tsv") else ".jsonl"
    target = out or inner.with_name(f"{inner.stem}.fixed{suffix}")
    counts = {name: count for name, count in fix_file(path, target, encoding).items() if count}
    if not quiet:
        made = ", ".join(f"{name}: {count:,}" for name, count in counts.items()) or "nothing to repair"
        print(f"{target}: {made}")
    return str(target)
