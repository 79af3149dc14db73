"""Paths of the built-in teacher, which `reft-ray serve` trains (`pipeline.builtin`)."""

from __future__ import annotations

from pathlib import Path

from reft_ray.core.errors import ReftError
from reft_ray.hf.model_store import cache_root

BUILTIN = "builtin"


def builtin_folder() -> Path:
    """The built-in teacher's directory, which may not exist yet."""
    return cache_root() / "builtin-teacher"


def teacher_folder(name: str) -> Path:
    """The directory of a teacher, given as a path or `builtin`. Raises ReftError if that has not been trained yet."""
    if name != BUILTIN:
        return Path(name)
    folder = builtin_folder()
    if not (folder / "teacher.json").is_file():
        raise ReftError(
            f"the built-in teacher is not at {folder}: run `reft-ray serve` once on this machine, or name a teacher's "
            "directory"
        )
    return folder
