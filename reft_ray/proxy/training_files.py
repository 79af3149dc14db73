"""Screen an uploaded training file: its kept rows, byte for byte, and the evidence of the others."""

from __future__ import annotations

import asyncio
import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from starlette.datastructures import UploadFile

from reft_ray.api.context import FilterContext
from reft_ray.api.errors import ApiError
from reft_ray.api.rows import lines
from reft_ray.api.verdict_stream import VerdictStream, ndjson
from reft_ray.atomic import atomic_write

CHUNK = 1 << 16
SHOWN_ROWS = 100
SPOOL_BYTES = 8 << 20


@dataclass
class ScreenedFile:
    """The outcome: `kept` and `evidence` are temporary files, `shown` the first rows that were not kept."""

    kept: IO[bytes]
    evidence: IO[bytes]
    counts: Counter[str] = field(default_factory=Counter)
    shown: list[dict[str, Any]] = field(default_factory=list)
    teacher: str = ""
    policy: str = ""

    @property
    def summary(self) -> dict[str, Any]:
        """Counts, and what judged."""
        counts = {name: self.counts[key] for name, key in _NAMES.items()}
        return {"rows": self.counts.total(), **counts, "teacher": self.teacher, "policy": self.policy}

    @property
    def reject_ratio(self) -> float:
        """The share of withheld rows among valid ones."""
        withheld = self.counts["review"] + self.counts["block"]
        return withheld / max(1, withheld + self.counts["allow"])

    def close(self) -> None:
        """Delete the temporary files."""
        self.kept.close()
        self.evidence.close()


_NAMES = {"kept": "allow", "review": "review", "blocked": "block", "invalid": "invalid"}


async def screen_upload(file: UploadFile, context: FilterContext) -> ScreenedFile:
    """Judge all rows of a JSONL file. Raises ApiError where a row gets no verdict: then nothing is kept."""
    found = ScreenedFile(_temporary(), _temporary())
    try:
        kept = await _judge(file, context, found)
        await file.seek(0)
        number = 0
        async for line in lines(_chunks(file), context.settings.max_row_bytes):
            if line is not None and kept[number]:
                text = line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
                await asyncio.to_thread(found.kept.write, text.rstrip(b"\r") + b"\n")
            number += 1
        found.kept.seek(0)
        found.evidence.seek(0)
    except BaseException:
        found.close()
        raise
    return found


def _temporary() -> IO[bytes]:
    return tempfile.SpooledTemporaryFile(SPOOL_BYTES)


async def _judge(file: UploadFile, context: FilterContext, found: ScreenedFile) -> bytearray:
    """A flag for each line: 1 if it is kept."""
    flags = bytearray()
    stream = VerdictStream(context, None)
    async with aclosing(stream.records(_chunks(file))) as batches:
        async for batch in batches:
            others = []
            for record in batch:
                flags.append(record["decision"] == "allow")
                if (record.get("reason") or {}).get("code") == "empty_line":
                    continue
                found.counts[record["decision"]] += 1
                found.teacher = record.get("teacher", found.teacher)
                found.policy = record.get("policy", found.policy)
                if record["decision"] != "allow":
                    others.append(_evidence(record))
            found.shown += others[: SHOWN_ROWS - len(found.shown)]
            await asyncio.to_thread(found.evidence.write, ndjson(others))
    if len(flags) != stream.tally.rows:
        raise ApiError(500, "Some rows got no verdict. Nothing was forwarded.", code="unjudged_rows")
    return flags


def _evidence(record: dict[str, Any]) -> dict[str, Any]:
    """A verdict's record without the stream's own keys; of an invalid row the code, as its message may quote it."""
    shown = {key: value for key, value in record.items() if key not in ("type", "row", "reason")}
    reason = {"code": record["reason"]["code"]} if "reason" in record else {}
    return {"line": record["row"] + 1, **shown, **reason}


async def _chunks(file: UploadFile) -> AsyncIterator[bytes]:
    while chunk := await file.read(CHUNK):
        yield chunk


class Records:
    """The evidence of the files that the proxy has screened, under the upstream's ids.

    One JSONL file for each: a summary, then the rows that were not forwarded. It holds no text.
    """

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
