"""What every command shares: how reports and errors reach the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from reft_ray.core.errors import ReftError

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of a table.")]


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn errors that a user can mend into one line on stderr and the exit code that the error carries."""
    try:
        yield
    except ReftError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, FileExistsError) as error:
        print(f"error: {error.strerror}: {error.filename}", file=sys.stderr)
        raise typer.Exit(1) from None


def print_json(document: Any) -> None:
    """Print a report as one JSON document."""
    print(json.dumps(document, indent=2, ensure_ascii=False))
