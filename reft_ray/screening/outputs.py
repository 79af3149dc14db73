"""The output directory: parts named after their unit, each written atomically.

    kept/part-<unit>.<ext>         rows that may be trained on, bytes unchanged, in the input's own format
    quarantine/part-<unit>.parquet withheld rows with their evidence
    invalid/part-<unit>.parquet    rows that could not be read, with every fault
    .screen/judged/<unit>.arrow    verdicts of a unit without text, where the dataset may get its own threshold
    .screen/threshold.json         that threshold, or why there is none
    .screen/units/<unit>.json      written last: the unit is done

A unit's files depend only on its rows and the dataset's threshold: screening it again, in any process, writes the same
files.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import orjson
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from reft_ray.core.cascade import GuardedVerdict
from reft_ray.core.conversation import parts, row_id
from reft_ray.rows.text import messages_json
from reft_ray.screening.file_parsing import FileShape
from reft_ray.screening.reading import Unit
from reft_ray.screening.screener import Outcome, ScreenedRow, ScreenedUnit
from reft_ray.screening.sources import Container, display_name, filesystem_of

QUARANTINE = pa.schema(
    [
        pa.field("row_number", pa.int64(), nullable=False),
        pa.field("source", pa.string()),
        pa.field("line", pa.int64()),
        pa.field("id", pa.string()),
        pa.field("decision", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("part", pa.string()),
        pa.field("encoding", pa.string()),
        pa.field("score", pa.float64()),
        pa.field("probability", pa.float64()),
        pa.field("threshold", pa.float64()),
        pa.field("windows", pa.int32()),
        pa.field("truncated", pa.bool_()),
        pa.field("teacher", pa.string()),
        pa.field("decided_by", pa.string()),
        pa.field("guard_score", pa.float64()),
        pa.field("span", pa.list_(pa.int64())),
        pa.field("categories", pa.list_(pa.string())),
        pa.field("hazards", pa.list_(pa.string())),
        pa.field("policy", pa.string()),
        pa.field("messages", pa.string()),
        pa.field("conversation", pa.string()),
        pa.field("raw", pa.large_binary()),
    ]
)
"""`messages` is the judged text, `conversation` what training reads, `raw` the row's bytes (columnar files: an
Arrow stream of the one row)."""

INVALID = pa.schema(
    [
        pa.field("row_number", pa.int64(), nullable=False),
        pa.field("source", pa.string()),
        pa.field("line", pa.int64()),
        pa.field("code", pa.string()),
        pa.field("path", pa.string()),
        pa.field("message", pa.string()),
        pa.field("hint", pa.string()),
        pa.field("raw", pa.large_binary()),
    ]
)
"""One record for each fault: a row with three faults has three. Its bytes are in the first."""

Found = TypeVar("Found")

_SUFFIXES = {"gzip": ".gz", "zstd": ".zst", None: ""}
UNITS = ".screen/units"
_READS = 32
_BATCH = 1024


class Output:
    """A directory, local or of a `pyarrow.fs` URI."""

    def __init__(self, uri: str) -> None:
        self.uri = uri if "://" in uri else str(Path(uri).absolute())
        self.name = display_name(uri)
        self._fs, self._root = filesystem_of(uri)

    def write(self, name: str, content: bytes) -> None:
        """Write or replace a file atomically."""
        path = f"{self._root}/{name}"
        if not self.is_local:
            with self._fs.open_output_stream(
                path, compression=None
            ) as stream:  # object stores show an object once it is complete
                stream.write(content)
            return
        temporary = f"{path}.{uuid.uuid4().hex}.tmp"
        try:
            with self._fs.open_output_stream(temporary, compression=None) as stream:
                stream.write(content)
        except FileNotFoundError:
            self._fs.create_dir(path.rpartition("/")[0], recursive=True)
            with self._fs.open_output_stream(temporary, compression=None) as stream:
                stream.write(content)
        self._fs.move(temporary, path)

    @contextlib.contextmanager
    def appending(self, name: str, content: bytes) -> Iterator[None]:
        """Append to a file in the top folder, in a `with` block.

        On a local file system the file is locked until the block ends. Object stores have no locks and cannot append:
        the file is rewritten, and of two concurrent writers one is lost.
        """
        if not self.is_local:
            with contextlib.suppress(FileNotFoundError):
                content = self.read(name) + content
            self.write(name, content)
            yield
            return
        with Path(f"{self._root}/{name}").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            yield

    def read(self, name: str) -> bytes:
        """A file's bytes. Raises FileNotFoundError."""
        with self._fs.open_input_file(f"{self._root}/{name}") as stored:
            return bytes(stored.read())

    def read_all(self, names: Sequence[str]) -> Iterator[bytes]:
        """The bytes of files, in order."""
        return self.each(names, lambda stored: bytes(stored.read()))

    def each(self, names: Sequence[str], read: Callable[[pa.NativeFile], Found]) -> Iterator[Found]:
        """What `read` finds in each file, in order; of a bucket, whose answers take long, many at a time."""

        def found(name: str) -> Found:
            with self._fs.open_input_file(f"{self._root}/{name}") as stored:
                return read(stored)

        if self.is_local:
            yield from map(found, names)
            return
        with ThreadPoolExecutor(_READS) as pool:
            # A few batches: what is read waits in memory.
            for start in range(0, len(names), _BATCH):
                yield from pool.map(found, names[start : start + _BATCH])

    def has(self, name: str) -> bool:
        """Whether a file is there; not every file system knows when it was written."""
        return bool(self._fs.get_file_info(f"{self._root}/{name}").type == pafs.FileType.File)

    def written_at(self, name: str) -> float | None:
        """Modification time of a file in seconds since the epoch; None where it is not known."""
        time = self._fs.get_file_info(f"{self._root}/{name}").mtime
        return None if time is None else float(time.timestamp())

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Sizes of the finished files in a folder, by name relative to the output."""
        selector = pafs.FileSelector(f"{self._root}/{folder}".rstrip("/"), allow_not_found=True, recursive=True)
        skip = len(self._root) + 1
        return {
            info.path[skip:]: info.size
            for info in self._fs.get_file_info(selector)
            if info.type == pafs.FileType.File and not info.path.endswith(".tmp")
        }

    def remove(self, name: str) -> None:
        """Delete a file if it exists."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.delete_file(f"{self._root}/{name}")

    def table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """A Parquet part, or some columns of it. Raises FileNotFoundError."""
        with self._fs.open_input_file(f"{self._root}/{name}") as stored:
            return pq.read_table(stored, columns=list(columns) if columns else None)

    def uri_of(self, name: str) -> str:
        """The path or URI of a file in the output."""
        if "://" not in self.uri:
            return f"{self.uri}/{name}"
        parts = urlsplit(self.uri)
        return parts._replace(path=f"{parts.path.rstrip('/')}/{name}").geturl()

    @property
    def is_local(self) -> bool:
        """Whether the directory is on a local file system."""
        return isinstance(self._fs, pafs.LocalFileSystem)


def kept_name(shape: FileShape, unit_id: str) -> str:
    """The file of a unit's kept rows."""
    return f"kept/part-{unit_id}{_suffix(shape)}"


def approved_name(shape: FileShape, unit_id: str) -> str:
    """The file of a unit's rows that a reviewer approved."""
    return f"kept/approved-{unit_id}{_suffix(shape)}"


def _suffix(shape: FileShape) -> str:
    suffix = ".tsv" if shape.container is Container.CSV and shape.name.endswith(".tsv") else f".{shape.container}"
    return suffix + _SUFFIXES[shape.compression]


def write_parts(output: Output, result: ScreenedUnit) -> dict[str, int]:
    """Write the parts of a unit and return their sizes by name. The caller then writes the state of the unit."""
    parts = {}
    kept = [index for index, row in enumerate(result.rows) if row.outcome is Outcome.KEPT]
    if kept:
        parts[kept_name(result.shape, result.unit.id)] = encode_rows(result.unit, result.shape, kept)
    evidence = [
        _evidence(result, index, row, row.verdict)
        for index, row in enumerate(result.rows)
        if row.verdict is not None and row.outcome is not Outcome.KEPT
    ]
    if evidence:
        quarantine = pa.Table.from_pylist(evidence, schema=QUARANTINE)
        parts[f"quarantine/part-{result.unit.id}.parquet"] = parquet_bytes(quarantine)
    invalid = [index for index, row in enumerate(result.rows) if row.outcome is Outcome.INVALID]
    if invalid:
        parts[f"invalid/part-{result.unit.id}.parquet"] = parquet_bytes(_invalid(result, invalid))
    for name, content in parts.items():
        output.write(name, content)
    return {name: len(content) for name, content in parts.items()}


def encode_rows(unit: Unit, shape: FileShape, indices: list[int]) -> bytes:
    """Some rows of a unit as a file of the input's format, their bytes unchanged."""
    if unit.native is not None:
        return encode_table(unit.native.take(pa.array(indices)), shape)
    raws = unit.rows["raw"].to_pylist()
    return encode_raws([raws[index] for index in indices], shape)


def encode_table(table: pa.Table, shape: FileShape) -> bytes:
    """Columns as a Parquet or Arrow file."""
    if shape.container is Container.PARQUET:
        return parquet_bytes(table)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def encode_raws(raws: list[bytes], shape: FileShape) -> bytes:
    """Row bytes as a JSONL, JSON or CSV file, compressed like the input."""
    if shape.container is Container.JSON:
        content = b"[\n" + b",\n".join(raws) + b"\n]\n"
    else:
        content = shape.header + b"".join(raw + b"\n" for raw in raws)
    if shape.compression is None:
        return content
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, shape.compression) as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def row_bytes(unit: Unit, index: int) -> bytes:
    """One row as stored in QUARANTINE.raw."""
    if unit.native is None:
        return unit.rows["raw"][index].as_py()
    sink = pa.BufferOutputStream()
    row = unit.native.slice(index, 1)
    with pa.ipc.new_stream(sink, row.schema) as writer:
        writer.write_table(row)
    return sink.getvalue().to_pybytes()


def done_units(output: Output) -> Iterator[str]:
    """Ids of the units whose state is written and whose parts have the recorded sizes."""
    sizes = output.sizes()
    for content in output.read_all([name for name in sizes if name.startswith(f"{UNITS}/")]):
        state = orjson.loads(content)
        if all(sizes.get(part) == size for part, size in state["parts"].items()):
            yield state["unit"]


def _evidence(result: ScreenedUnit, index: int, row: ScreenedRow, verdict: GuardedVerdict) -> dict[str, object]:
    return {
        "row_number": row.number,
        "source": result.shape.name,
        "line": row.number - result.shape.first_row,
        "id": row_id(row.judged),
        "decision": str(verdict.decision),
        "reason": reason_of(row, verdict),
        "part": verdict.part,
        "encoding": verdict.encoding,
        "score": verdict.score,
        "probability": verdict.probability,
        "threshold": verdict.threshold,
        "windows": verdict.windows,
        "truncated": verdict.truncated,
        "teacher": verdict.teacher,
        "decided_by": verdict.decided_by,
        "guard_score": verdict.guard_score,
        "span": verdict.span,
        "categories": verdict.categories,
        "hazards": verdict.hazards,
        "policy": verdict.policy,
        "messages": messages_json(row.judged),
        "conversation": messages_json(row.conversation),
        "raw": row_bytes(result.unit, index),
    }


def reason_of(row: ScreenedRow, verdict: GuardedVerdict) -> str:
    """Why a valid row is withheld, as a code."""
    if not verdict.by_teacher:
        return "flagged_by_guard"
    if not verdict.part:
        return "not_judged" if parts(row.judged) else "no_text"
    if verdict.by_job_threshold:
        return "job_threshold"
    if verdict.reason == "truncated":
        return "not_read_to_its_end"
    encoded = "_when_decoded" if verdict.encoding else ""
    return ("score_above_block" if row.outcome is Outcome.BLOCKED else "score_above_review") + encoded


def _invalid(result: ScreenedUnit, indices: list[int]) -> pa.Table:
    records = [
        {
            "row_number": result.rows[index].number,
            "source": result.shape.name,
            "line": result.rows[index].number - result.shape.first_row,
            "code": fault.code,
            "path": fault.path,
            "message": fault.message,
            "hint": fault.hint,
            # Once, however many faults the row has.
            "raw": row_bytes(result.unit, index) if number == 0 else None,
        }
        for index in indices
        for number, fault in enumerate(result.rows[index].faults)
    ]
    return pa.Table.from_pylist(records, schema=INVALID)


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()
