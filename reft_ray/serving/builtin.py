"""Paths of the built-in teacher, which `reft-ray serve` trains (`pipeline.builtin`)."""

from __future__ import annotations

import os
from pathlib import Path

from reft_ray.core.errors import ReftError

BUILTIN = "builtin"


def cache_root() -> Path:
    """The user's cache directory; `REFT_CACHE` overrides it."""
    root = os.environ.get("REFT_CACHE")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reft-ray"


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
