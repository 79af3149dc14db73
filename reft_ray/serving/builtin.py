"""Where the built-in teacher is kept once `reft-ray serve` has trained it."""

from __future__ import annotations

import os
from pathlib import Path

from reft_ray.core.errors import ReftError


def cache_root() -> Path:
    """The user's cache directory; `REFT_CACHE` overrides it."""
    root = os.environ.get("REFT_CACHE")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reft-ray"


def builtin_folder() -> Path:
    """The built-in teacher's directory, whether it is there or not."""
    return cache_root() / "builtin-teacher"


def builtin_teacher() -> Path:
    """The built-in teacher. Raises ReftError where it has not been trained yet."""
    folder = builtin_folder()
    if not (folder / "teacher.json").is_file():
        raise ReftError(
            f"the built-in teacher is not at {folder}: run `reft-ray serve` once on this machine, or name a teacher's "
            "directory"
        )
    return folder
