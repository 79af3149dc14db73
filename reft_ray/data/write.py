"""Moderated rows to files, each of them once: a Datasink whose parts count when its manifest names them.

kept/part-*.jsonl          rows that may be trained on: their bytes, or their messages where they have none
quarantine/part-*.parquet  withheld rows with their verdicts
invalid/part-*.parquet     rows that could not be read, with their faults
manifest.parquet           the parts that count, with their rows and bytes; written last
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray.data
from ray.data import Datasink

from reft_ray.core.errors import UsageError
from reft_ray.screening.outputs import Output, parquet_bytes

MANIFEST = "manifest.parquet"
PARTS = pa.schema(
    [
        pa.field("part", pa.string(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
    ]
)
_FOLDERS = {"allow": "kept", "review": "quarantine", "block": "quarantine", "invalid": "invalid"}
Part = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class Written:
    """Rows by folder: rows = kept + quarantine + invalid."""

    rows: int
    kept: int
    quarantine: int
    invalid: int


def write_rows(rows: ray.data.Dataset, out: str, **options: Any) -> Written:
    """Run the pipeline and write its rows, as `read_rows` and `Moderate` make them, into an empty directory or URI.

    A row is in exactly one part of the manifest, also after tasks or workers died; parts of attempts that did not
    finish are deleted. Without a manifest nothing counts: run it again. `options` go to `Dataset.write_datasink`.
    Raises UsageError for an output that has a manifest.
    """
    output = Output(out)
    if output.has(MANIFEST):
        raise UsageError(f"{output.name}: has rows already; name a new directory")
    rows.write_datasink(RowsSink(out), **options)
    return written(out)


def written(out: str) -> Written:
    """The counts of a finished output."""
    table = Output(out).table(MANIFEST)
    counts: Counter[str] = Counter()
    for part, rows in zip(table["part"].to_pylist(), table["rows"].to_pylist(), strict=True):
        counts[part.partition("/")[0]] += rows
    return Written(sum(counts.values()), counts["kept"], counts["quarantine"], counts["invalid"])


class RowsSink(Datasink[list[Part]]):
    """Writes parts under names of their own; the driver names those that count."""

    def __init__(self, out: str) -> None:
        self._out = Output(out).uri

    def write(self, blocks: Iterable[Any], ctx: Any) -> list[Part]:
        """Write the blocks of one task; (part, rows, bytes) of each part."""
        output, attempt = Output(self._out), uuid.uuid4().hex[:12]
        parts: list[Part] = []
        for number, block in enumerate(blocks):
            table = pa.table(block) if isinstance(block, pa.Table) else pa.Table.from_pandas(block)
            folders = [_FOLDERS[decision] for decision in table["decision"].to_pylist()]
            for folder in dict.fromkeys(folders):
                chosen = table.filter(pc.equal(pa.array(folders), folder))
                content = _lines(chosen) if folder == "kept" else parquet_bytes(chosen)
                suffix = "jsonl" if folder == "kept" else "parquet"
                name = f"{folder}/part-{ctx.task_idx:06d}-{attempt}-{number:04d}.{suffix}"
                output.write(name, content)
                parts.append((name, chosen.num_rows, len(content)))
        return parts

    def on_write_complete(self, write_result: Any) -> None:
        """Delete what attempts left that did not finish, then write the manifest."""
        output = Output(self._out)
        parts = sorted(part for returned in write_result.write_returns for part in returned)
        counted = {name for name, _, _ in parts}
        for name in output.sizes():
            if name.partition("/")[0] in _FOLDERS.values() and name not in counted:
                output.remove(name)
        columns = list(zip(*parts, strict=True)) or [(), (), ()]
        output.write(MANIFEST, parquet_bytes(pa.table([list(column) for column in columns], schema=PARTS)))


def _lines(table: pa.Table) -> bytes:
    raws = table["raw"].to_pylist() if "raw" in table.column_names else [None] * table.num_rows
    messages = table["messages"].to_pylist()
    rows = (raw or f'{{"messages":{text}}}'.encode() for raw, text in zip(raws, messages, strict=True))
    return b"".join(row.rstrip(b"\r\n") + b"\n" for row in rows)
