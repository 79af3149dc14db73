"""`reft-ray teacher install | rollback | history`: which teacher judges, by signed changes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reft_ray.cli.common import TEACHER, JsonOption, print_json, user_errors
from reft_ray.teachers import teacher_folder

if TYPE_CHECKING:
    from reft_ray.hf.teacher_shelf import Change

ShelfOption = Annotated[Path, typer.Option(help="The directory with `current`, the teacher of a service.")]
KeyOption = Annotated[Path, typer.Option(help="The private key of `reft-ray models keygen` that signs changes.")]
ByOption = Annotated[str, typer.Option(help="Who decides.")]
ReasonOption = Annotated[str, typer.Option(help="Why, for those who read the history.")]


def install(
    teacher: Annotated[Path, typer.Argument(parser=teacher_folder, metavar="TEACHER", help=TEACHER)],
    shelf: ShelfOption,
    key: KeyOption,
    by: ByOption,
    reason: ReasonOption,
) -> None:
    """Let a teacher judge, such as one with new thresholds: a signed change that `rollback` takes back."""
    with user_errors():
        from reft_ray.hf.teacher_shelf import TeacherShelf

        _show(TeacherShelf(shelf, key).install(teacher, by, reason))


def rollback(shelf: ShelfOption, key: KeyOption, by: ByOption, reason: ReasonOption) -> None:
    """Let the teacher judge that did before the last change; itself a signed change."""
    with user_errors():
        from reft_ray.hf.teacher_shelf import TeacherShelf

        _show(TeacherShelf(shelf, key).rollback(by, reason))


def history(
    shelf: ShelfOption,
    key: Annotated[Path, typer.Option(help="The public key of those changes.")],
    as_json: JsonOption = False,
) -> None:
    """Verify and show all changes; exit code 1 where one was altered, or `current` is not the last one."""
    with user_errors():
        from dataclasses import asdict

        from reft_ray.hf.teacher_shelf import TeacherShelf

        found = TeacherShelf(shelf, key)
        changes = found.changes()
        if as_json:
            print_json([asdict(change) for change in changes])
        else:
            for change in changes:
                _show(change)
        found.check()


def _show(change: Change) -> None:
    from datetime import UTC, datetime

    when = datetime.fromtimestamp(change.at, UTC).isoformat(timespec="seconds")
    bounds = ", ".join(f"{name} {value:.4f}" for name, value in change.thresholds.items())
    typer.echo(f"{change.number}  {when}  {change.kind:<8}  {change.before or '-'} -> {change.teacher}  ({bounds})")
    typer.echo(f"   {change.by}: {change.reason}")
