"""Files and directories that appear whole or not at all: written under a temporary name, then renamed."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path next to `path` to write a file at; it replaces `path` when the block ends without an error.

    Parent directories are made. Of concurrent writers of one path the last wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """An empty temporary directory next to `path`; it is renamed to `path` when the block ends without an error.

    With `replace` an older directory there is removed first. Raises OSError for one that is not empty otherwise.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        content = Path(scratch) / path.name
        content.mkdir()
        yield content
        if replace and path.exists():
            shutil.rmtree(path)
        content.rename(path)
