"""The options of a command for reading rows: format, container, columns, speakers, tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from reft_ray.core.errors import UsageError

READING = "Reading"
FormatOption = Annotated[
    str | None, typer.Option("--format", help="Row format instead of detecting it.", rich_help_panel=READING)
]
ContainerOption = Annotated[
    str | None, typer.Option("--container", help="File format instead of detecting it.", rich_help_panel=READING)
]
ColumnOption = Annotated[
    list[str] | None,
    typer.Option("--column", help="FIELD=COLUMN, e.g. prompt=question; keys of turns too.", rich_help_panel=READING),
]
SpeakerOption = Annotated[
    list[str] | None,
    typer.Option("--speaker", help="SPEAKER=ROLE of ShareGPT rows, e.g. narrator=system.", rich_help_panel=READING),
]
TokenizerOption = Annotated[
    Path | None,
    typer.Option(
        "--tokenizer",
        help="The base model's directory (or its tokenizer.json): rows with its control tokens are invalid, and so are "
        "rows that its chat template cannot render.",
        rich_help_panel=READING,
    ),
]


def named(kind: Any, value: str | None, flag: str) -> Any:
    """The member of an enumeration of that name. Raises UsageError."""
    if value is not None and value not in list(kind):
        raise UsageError(f"{flag} {value}: there are {', '.join(kind)}")
    return None if value is None else kind(value)


def pairs(values: Sequence[str] | None, flag: str, example: str) -> dict[str, str]:
    """`["a=b"]` as a dictionary. Raises UsageError."""
    found = {}
    for value in values or ():
        left, equals, right = value.partition("=")
        if not (left and equals and right):
            raise UsageError(f"{flag} {value}: expected {example}")
        found[left] = right
    return found


def columns_of(values: Sequence[str] | None) -> dict[str, str]:
    """The value of `--column`."""
    return pairs(values, "--column", "FIELD=COLUMN, e.g. prompt=question")


def speakers_of(values: Sequence[str] | None) -> dict[str, str]:
    """The value of `--speaker`: roles by speaker."""
    from reft_ray.rows.turns import SPEAKERS

    found = pairs(values, "--speaker", "SPEAKER=ROLE, e.g. narrator=system")
    for speaker, role in found.items():
        if role not in SPEAKERS.values():
            raise UsageError(f"--speaker {speaker}={role}: roles are {', '.join(dict.fromkeys(SPEAKERS.values()))}")
    return found
