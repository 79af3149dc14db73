"""Parts of a file that are read apart from each other, in any process: spans of JSONL, row groups of Parquet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from reft_ray.core.errors import UsageError, first_line
from reft_ray.screening.sources import Container, Source

Item = TypeVar("Item")

SPAN_BYTES = 64 << 20
_LOOK_BYTES = 1 << 16
_SMALL_FILE = 1 << 20
"""Bytes that take about as long as opening a file."""
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Piece:
    """The lines that start in the bytes [start, end) of a JSONL file, the row groups [start, end) of a Parquet file, or
    (`end` None) a whole file.

    `size` is about its bytes (decompressed in Parquet). `first_line` is the number of its first line, if it is known.
    """

    source: Source
    size: int
    start: int = 0
    end: int | None = None
    first_line: int | None = 1


def pieces_of(source: Source, span_bytes: int = SPAN_BYTES) -> list[Piece]:
    """A file in pieces of about `span_bytes`; JSONL by its size alone, Parquet by its footer.

    Compressed files, CSV, JSON text and Arrow have no places to start at and are one piece.
    """
    if source.container is Container.PARQUET:
        return _joined_groups(source, _group_bytes(source), span_bytes)
    if source.container is not Container.JSONL or source.compression:
        return [Piece(source, source.size)]
    # No span ends inside of a byte-order mark.
    span_bytes = max(span_bytes, 16)
    starts = range(0, max(source.size, 1), span_bytes)
    ends = [min(start + span_bytes, source.size) for start in starts]
    return [
        Piece(source, end - start, start, end, None if start else 1) for start, end in zip(starts, ends, strict=True)
    ]


def read_cost(item: Any) -> int:
    """About how long it takes to read an item with a `size` in bytes, in bytes."""
    return max(getattr(item, "size", 0), _SMALL_FILE)


def batches(items: Iterable[Item], most: int) -> Iterator[list[Item]]:
    """Items that one task reads together, of a cost of about `most` bytes."""
    batch: list[Item] = []
    held = 0
    for item in items:
        batch.append(item)
        held += read_cost(item)
        if held >= most:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def first_byte(stored: pa.NativeFile, piece: Piece) -> int:
    """Where the first line of a piece of JSONL starts, after a byte-order mark; its end, if none starts in it."""
    end = piece.end or 0
    if piece.start == 0:
        return min(len(_BOM), end) if bytes(stored.read_at(len(_BOM), 0)) == _BOM else 0
    # A line that starts at the first byte follows a line feed.
    at = piece.start - 1
    while at < end and (data := bytes(stored.read_at(min(_LOOK_BYTES, end - at), at))):
        if (feed := data.find(b"\n")) >= 0:
            return min(at + feed + 1, end)
        at += len(data)
    return end


def _group_bytes(source: Source) -> list[int]:
    try:
        with source.open() as stored:
            footer = pq.ParquetFile(stored).metadata
            return [footer.row_group(index).total_byte_size for index in range(footer.num_row_groups)]
    except (OSError, pa.ArrowInvalid, MemoryError) as error:
        raise UsageError(f"{source.name}: damaged file: {first_line(error)}") from error


def _joined_groups(source: Source, sizes: list[int], span_bytes: int) -> list[Piece]:
    pieces: list[Piece] = []
    start = held = 0
    for group, size in enumerate(sizes):
        held += size
        if held >= span_bytes or group == len(sizes) - 1:
            pieces.append(Piece(source, held, start, group + 1, None))
            start, held = group + 1, 0
    return pieces or [Piece(source, source.size)]
