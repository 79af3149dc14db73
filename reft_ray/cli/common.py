"""What all commands share: output, errors, options, `--set`, metrics, and access to a service or its database."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reft_ray.atomic import atomic_write
from reft_ray.core.errors import ReftError, UsageError
from reft_ray.teachers import teacher_folder

if TYPE_CHECKING:
    from reft_ray.api.remote import Remote
    from reft_ray.jobs.database import Database
    from reft_ray.telemetry.recorder import Recorder

TEACHER = "The Ref-Teacher: a directory, or `builtin` for that of SmolLM2."
_TEACHER_OPTION = typer.Option("--teacher", parser=teacher_folder, metavar="<path>", help=TEACHER)
TeacherOption = Annotated[Path | None, _TEACHER_OPTION]
NeededTeacherOption = Annotated[Path, _TEACHER_OPTION]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of a table.")]
DatabaseOption = Annotated[
    str,
    typer.Option(
        envvar="REFT_DATABASE",
        help="The service's database: sqlite:///STATE/service.db for `reft-ray serve --state STATE`, or "
        "postgresql+psycopg://USER@HOST/NAME.",
    ),
]
UrlOption = Annotated[str, typer.Option(envvar="OPENAI_BASE_URL", help="The service's address, with /v1.")]
KeyOption = Annotated[
    str, typer.Option(envvar="OPENAI_API_KEY", help="An API key; any text if the service uses no keys.")
]
JobThresholdOption = Annotated[
    bool,
    typer.Option(
        help="Withhold for review rows above the threshold that the dataset's own scores give; never laxer.",
        rich_help_panel="Decisions",
    ),
]
JobThresholdFloorOption = Annotated[
    float, typer.Option(help="The lowest score that this threshold may have.", rich_help_panel="Decisions")
]

DEFAULT_URL = "http://127.0.0.1:8000/v1"
METRICS_FILE = "REFT_METRICS_FILE"


def state_database(state: Path) -> str:
    """The database of `reft-ray serve --state DIRECTORY`."""
    return f"sqlite:///{state / 'service.db'}"


DEFAULT_DATABASE = state_database(Path("state"))
"""The database of `reft-ray serve --state state/` in the current directory."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Print an error that the user can fix as one line on stderr, and exit with the error's exit code."""
    try:
        yield
    except ReftError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    except (
        FileNotFoundError,
        IsADirectoryError,
        NotADirectoryError,
        PermissionError,
        FileExistsError,
        TimeoutError,
    ) as error:
        print(f"error: {error.strerror}: {error.filename}", file=sys.stderr)
        raise typer.Exit(1) from None


def print_json(document: Any) -> None:
    """Print a report as one JSON document."""
    print(json.dumps(document, indent=2, ensure_ascii=False))


def parse_settings(settings: Sequence[str] | None) -> dict[str, Any]:
    """`["optimizer.learning_rate=1e-4"]` -> `{"optimizer": {"learning_rate": 1e-4}}`; values are JSON or plain text."""
    values: dict[str, Any] = {}
    for setting in settings or ():
        path, equals, text = setting.partition("=")
        if not equals or not path:
            raise UsageError(f"--set {setting}: write it as key=value")
        target = values
        *parents, last = path.split(".")
        for step in parents:
            target = target.setdefault(step, {})
        try:
            target[last] = json.loads(text)
        except json.JSONDecodeError:
            target[last] = text
    return values


@contextmanager
def running_service(url: str, key: str) -> Iterator[Remote]:
    """A client of a running service, for a command's body; includes `user_errors`."""
    with user_errors():
        from reft_ray.api.remote import Remote

        with Remote(url, key) as remote:
            yield remote


@contextmanager
def open_database(url: str) -> Iterator[Database]:
    """The existing database of a service, migrated to the current schema; closed at the end of the block."""
    from reft_ray.jobs.database import Database

    try:
        database = Database.open_existing(url)
    except UsageError as error:
        raise UsageError(f"{error}; set --database or REFT_DATABASE to the service's database") from None
    try:
        yield database
    finally:
        database.close()


@contextmanager
def recording() -> Iterator[Recorder]:
    """The command's recorder: Ray metrics on a cluster, a file for node exporter's textfile collector, or none.

    The file is named by REFT_METRICS_FILE and is written when the command ends, also after an error.
    """
    from reft_ray.telemetry.recorder import NullRecorder, PrometheusRecorder

    if path := os.environ.get(METRICS_FILE):
        recorder = PrometheusRecorder()
        try:
            yield recorder
        finally:
            with atomic_write(Path(path)) as scratch:
                scratch.write_bytes(recorder.exposition())
    elif os.environ.get("RAY_ADDRESS"):
        from reft_ray.telemetry.shared_recorder import recorder_from_environment

        shared = recorder_from_environment()
        try:
            yield shared
        finally:
            shared.close()
    else:
        yield NullRecorder()
