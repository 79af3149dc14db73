"""The Ref-Teacher that comes with the package, for SmolLM2-135M-Instruct."""

from __future__ import annotations

from pathlib import Path

BUILTIN = "builtin"


def teacher_folder(name: str) -> Path:
    """The directory of a teacher, given as a path or `builtin`."""
    return Path(__file__).parent / "smollm2" if name == BUILTIN else Path(name)
