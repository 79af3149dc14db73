"""What the proxy remembers of the files that it screened: the evidence of each, under the upstream's id."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from reft_ray.atomic import atomic_write


class Records:
    """One JSONL file for each screened file: a summary, then the rows that were not forwarded. It holds no text."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, file_id: str) -> Path:
        """Where a file's evidence is; it exists only for screened files."""
        # The upstream chooses ids, so they are not used as file names.
        return self._folder / f"{hashlib.sha256(file_id.encode()).hexdigest()}.jsonl"

    def add(self, file_id: str, summary: dict[str, Any], rows: Iterable[bytes]) -> None:
        """Remember a file; `rows` are lines of JSON."""
        with atomic_write(self.path(file_id)) as scratch, scratch.open("wb") as out:
            out.write(json.dumps({"type": "summary", **summary}).encode() + b"\n")
            out.writelines(rows)

    def knows(self, file_id: str) -> bool:
        """Whether the file was screened here."""
        return self.path(file_id).is_file()

    def remove(self, file_id: str) -> None:
        """Forget a file."""
        self.path(file_id).unlink(missing_ok=True)
