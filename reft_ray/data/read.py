"""Training rows as a Ray dataset: a Datasource whose tasks read byte ranges, or row groups, in parallel.

The driver lists the files and takes their pieces (`screening.pieces`), for which it reads only the footers of Parquet.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import orjson
import pyarrow as pa
import ray
import ray.data
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from reft_ray.core.errors import UsageError
from reft_ray.local_ray import ensure_ray
from reft_ray.rows.format import Format, detect
from reft_ray.rows.reader import RowReader, sampled_rows
from reft_ray.rows.text import messages_json
from reft_ray.screening.file_parsing import shape_of, validated_rows
from reft_ray.screening.pieces import SPAN_BYTES, Piece, batches, first_byte, pieces_of, read_cost
from reft_ray.screening.ranges import Limits
from reft_ray.screening.reading import groups, plan_piece, read_units
from reft_ray.screening.sources import Container, find_sources

ROWS = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("position", pa.int64(), nullable=False),
        pa.field("line", pa.int64()),
        pa.field("raw", pa.large_binary()),
        pa.field("messages", pa.large_string()),
        pa.field("judged", pa.large_string()),
        pa.field("faults", pa.string()),
    ]
)
"""One row: `position` is its first byte in a JSONL file, else its number in the file; with `source` it identifies the
row. `raw` are its bytes (null in Parquet and Arrow). `messages` is what training reads and `judged` all text that a
model could learn, both as OpenAI messages in JSON; null where the row has `faults` (a JSON list)."""

_BLOCK_BYTES = 4 << 20
LONGEST_ROW = 16 << 20


def read_rows(
    inputs: str | Sequence[str],
    *,
    format: Format | str | None = None,
    columns: Mapping[str, str] | None = None,
    speakers: Mapping[str, str] | None = None,
    container: Container | str | None = None,
    control_tokens: Sequence[str] = (),
    lines: bool = False,
    span_bytes: int = SPAN_BYTES,
    **options: Any,
) -> ray.data.Dataset:
    """The rows of files, directories, globs or URIs as a dataset with the schema ROWS; invalid rows keep their place.

    `format`, `columns`, `speakers` and `container` are those of `reft-ray screen`. `lines` numbers the rows of JSONL
    by line, for which tasks count the lines of every range first; otherwise `line` is null there. `options` go to
    `ray.data.read_datasource`. Raises UsageError for inputs that do not exist or hold no rows.
    """
    ensure_ray()
    reader = RowReader(Format(format) if format else None, columns, control_tokens, speakers=speakers)
    sources = find_sources([inputs] if isinstance(inputs, str) else inputs, Container(container) if container else None)
    pieces = [piece for source in sources for piece in pieces_of(source, span_bytes)]
    if lines:
        pieces = _numbered(pieces)
    return ray.data.read_datasource(RowsDatasource(pieces, reader), **options)


def _numbered(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces with their first lines: a prefix sum over the line feeds of each, which tasks count."""
    count = ray.remote(num_cpus=1)(_line_feeds)
    found = ray.get([count.remote(piece) for piece in pieces])
    numbered: list[Piece] = []
    next_line = 1
    for piece, feeds in zip(pieces, found, strict=True):
        next_line = next_line if piece.start else 1
        numbered.append(replace(piece, first_line=next_line))
        next_line += feeds
    return numbered


def _line_feeds(piece: Piece) -> int:
    """The line feeds before the end of the last line that starts in the piece."""
    return sum(data.count(b"\n") for _, data in _chunks(piece)) if _by_lines(piece) else 0


def _by_lines(piece: Piece) -> bool:
    return piece.end is not None and piece.source.container is Container.JSONL


class RowsDatasource(Datasource):
    """Pieces of files as read tasks."""

    def __init__(self, pieces: Sequence[Piece], reader: RowReader) -> None:
        super().__init__()
        self._pieces = pieces
        self._reader = reader

    def estimate_inmemory_data_size(self) -> int | None:
        """Bytes of all rows: as text and twice as messages."""
        return 3 * sum(piece.size for piece in self._pieces)

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """At most `parallelism` tasks, each with pieces that follow each other."""
        whole = sorted(self._pieces, key=lambda piece: piece.source.uri)
        share = -(-sum(map(read_cost, whole)) // max(1, parallelism))
        return [self._task(group) for group in batches(whole, share)]

    def _task(self, group: Sequence[Piece]) -> ReadTask:
        size = sum(piece.size for piece in group)
        names = tuple(piece.source.name for piece in group)
        metadata = BlockMetadata(num_rows=None, size_bytes=3 * size, exec_stats=None, input_files=names)
        return ReadTask(partial(_read, group, self._reader), metadata, schema=ROWS)


def _read(pieces: Sequence[Piece], reader: RowReader) -> Iterator[pa.Table]:
    empty = True
    for piece in pieces:
        for table in blocks(piece, reader):
            empty = False
            yield table
    if empty:
        yield ROWS.empty_table()


def blocks(piece: Piece, reader: RowReader) -> Iterator[pa.Table]:
    """The rows of a piece, a few megabytes at a time."""
    if not _by_lines(piece):
        yield from _units(piece, reader)
        return
    name, line, read = piece.source.name, piece.first_line, None
    for offset, data in _chunks(piece):
        read = read or line_reader(data, reader, name)
        table = table_of(data, name, offset, line, read)
        line = None if line is None else line + data.count(b"\n")
        if table.num_rows:
            yield table


def table_of(
    data: bytes, name: str, offset: int, line: int | None, read: Callable[[bytes], Any], judging: bool = False
) -> pa.Table:
    """The rows of whole lines, the first at byte `offset` and on line `line` (None: not counted).

    Rows that are only judged have no `messages`.
    """
    found = []
    for number, raw in enumerate(data.split(b"\n")):
        if raw and not raw.isspace():
            found.append(_row(name, offset, None if line is None else line + number, raw, read(raw), judging))
        offset += len(raw) + 1
    return pa.Table.from_pylist(found, schema=ROWS)


def line_reader(data: bytes, reader: RowReader, name: str) -> Callable[[bytes], Any]:
    """How a line is read: in the reader's format or, without one, in that of the first rows."""
    if reader.format is not None:
        return reader.read_line
    sample = sampled_rows(data.split(b"\n"), reader.columns)
    return reader.of_format(detect(sample, name, reader.speakers) if sample else Format.CHAT).read_line


def _chunks(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """(offset, whole lines) of a piece, about `_BLOCK_BYTES` at a time. Raises UsageError for a line without an end."""
    end = piece.end or 0
    with piece.source.open() as stored:
        at = first_byte(stored, piece)
        while at < end:
            data = bytes(stored.read_at(min(_BLOCK_BYTES, end - at), at))
            while data and not data.endswith(b"\n") and at + len(data) < piece.source.size:
                if len(data) > LONGEST_ROW + _BLOCK_BYTES:
                    message = f"a row after byte {at:,} is longer than {LONGEST_ROW:,} bytes"
                    raise UsageError(f"{piece.source.name}: {message}")
                more = bytes(stored.read_at(min(1 << 16, piece.source.size - at - len(data)), at + len(data)))
                feed = more.find(b"\n")
                data += more if feed < 0 else more[: feed + 1]
            if not data:
                return
            yield at, data
            at += len(data)


def _units(piece: Piece, reader: RowReader) -> Iterator[pa.Table]:
    source, plan = piece.source, plan_piece(piece, Limits())
    shape = shape_of(plan, reader.format, reader.columns, reader.speakers)
    reader = reader.of_format(shape.format)
    for unit in itertools.chain.from_iterable(read_units(plan, ranges) for ranges in groups(plan)):
        rows = validated_rows(unit, shape, reader)
        found = [_row(source.name, number, number, raw, row) for number, raw, row in rows]
        yield pa.Table.from_pylist(found, schema=ROWS)


def _row(
    source: str, position: int, line: int | None, raw: bytes | None, found: Any, judging: bool = False
) -> dict[str, Any]:
    row = {"source": source, "position": position, "line": line, "raw": raw}
    if isinstance(found, list):
        return row | {"faults": orjson.dumps([fault._asdict() for fault in found]).decode()}
    messages = None if judging else messages_json(found.conversation)
    return row | {"messages": messages, "judged": messages_json(found.judged)}
