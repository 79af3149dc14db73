"""How commands find the service's records."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from reft_ray.jobs.database import Database

DatabaseOption = Annotated[
    str,
    typer.Option(
        envvar="REFT_DATABASE",
        help="The service's database: sqlite:///PATH or postgresql+psycopg://USER@HOST/NAME.",
    ),
]
UrlOption = Annotated[str, typer.Option(envvar="OPENAI_BASE_URL", help="The service's address, with /v1.")]
KeyOption = Annotated[str, typer.Option(envvar="OPENAI_API_KEY", help="An API key; any text where there are none.")]

DEFAULT_DATABASE = "sqlite:///.reft/jobs.db"
DEFAULT_URL = "http://127.0.0.1:8000/v1"


@contextmanager
def open_database(url: str) -> Iterator[Database]:
    """The database, brought up to date, and closed behind the block."""
    from reft_ray.jobs.database import Database

    database = Database.open(url)
    try:
        yield database
    finally:
        database.close()
