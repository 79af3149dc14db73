"""How commands find the service's records."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reft_ray.core.errors import UsageError

if TYPE_CHECKING:
    from reft_ray.jobs.database import Database

DatabaseOption = Annotated[
    str,
    typer.Option(
        envvar="REFT_DATABASE",
        help="The service's database: sqlite:///STATE/service.db for `reft-ray serve --state STATE`, or "
        "postgresql+psycopg://USER@HOST/NAME.",
    ),
]
UrlOption = Annotated[str, typer.Option(envvar="OPENAI_BASE_URL", help="The service's address, with /v1.")]
KeyOption = Annotated[str, typer.Option(envvar="OPENAI_API_KEY", help="An API key; any text where there are none.")]

DEFAULT_URL = "http://127.0.0.1:8000/v1"


def state_database(state: Path) -> str:
    """The database of `reft-ray serve --state DIRECTORY`."""
    return f"sqlite:///{state / 'service.db'}"


DEFAULT_DATABASE = state_database(Path("state"))
"""What `reft-ray serve --state state/` leaves in the same directory."""


@contextmanager
def open_database(url: str) -> Iterator[Database]:
    """The service's database, brought up to date, and closed behind the block; it must be there."""
    from reft_ray.jobs.database import Database

    try:
        database = Database.open_existing(url)
    except UsageError as error:
        raise UsageError(f"{error}; name the service's with --database or REFT_DATABASE") from None
    try:
        yield database
    finally:
        database.close()
