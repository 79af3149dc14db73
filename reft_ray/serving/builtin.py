"""The Ref-Teacher that comes with the package, for SmolLM2-135M-Instruct."""

from __future__ import annotations

from pathlib import Path

import reft_ray

BUILTIN = "builtin"


def teacher_folder(name: str) -> Path:
    """The directory of a teacher, given as a path or `builtin`."""
    return Path(reft_ray.__file__).parent / "teachers" / "smollm2" if name == BUILTIN else Path(name)
