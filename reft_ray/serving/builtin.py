"""The Ref-Teacher that comes with the package, for SmolLM2-135M-Instruct."""

from __future__ import annotations

from pathlib import Path

import reft_ray

BUILTIN = "builtin"
ALIGNMENT = "alignment.jsonl"


def teacher_folder(name: str) -> Path:
    """The directory of a teacher, given as a path or `builtin`."""
    return Path(reft_ray.__file__).parent / "teachers" / "smollm2" if name == BUILTIN else Path(name)


def alignment_file(teacher: Path) -> Path | None:
    """The labelled alignment rows that come with a teacher, if any: for students of its base model."""
    file = teacher / ALIGNMENT
    return file if file.is_file() else None
