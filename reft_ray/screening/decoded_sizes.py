"""How much memory Parquet and Arrow files take once decoded, from the headers of their pages and buffers.

Both are compressed in pieces that a reader inflates whole: 64 KiB of file may take gigabytes. What the footer says of
sizes is not trusted: the decoder reads the headers in front of the pieces, and so does this module.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from reft_ray.core.errors import UsageError

PAGE_BYTES = 64 << 20
"""Of one decoded page: four times the largest row."""
TOGETHER_BYTES = 512 << 20
"""Of what is in memory at the same time: the largest pages of all columns, or an Arrow batch."""
GROUP_VALUES = 1 << 28
"""Values without bytes, nulls among them, still take an offset each."""
MAX_PAGES = 1 << 20
_HEADER_BYTES = 1 << 12
_MAX_HEADER_BYTES = 1 << 22
_DELTA_BYTE_ARRAY = 7


@dataclass(frozen=True, slots=True)
class GroupSize:
    """Of a row group: bytes of all pages, and of the largest data and dictionary pages of all columns together."""

    total: int
    together: int


def group_size(stored: pa.NativeFile, metadata: pq.FileMetaData, group: int, name: str) -> GroupSize:
    """The decoded size of a row group. Raises UsageError for one that is too large, or for damaged headers."""
    pages = total = together = values = 0
    for index in range(metadata.num_columns):
        column = metadata.row_group(group).column(index)
        largest = {True: 0, False: 0}
        for size, count, is_dictionary, encoding in _pages(stored, column, name):
            pages += 1
            if size > PAGE_BYTES:
                raise _too_large(name, f"a page of column {column.path_in_schema[:40]} has {size:,} bytes")
            if encoding == _DELTA_BYTE_ARRAY:
                what = f"column {column.path_in_schema[:40]} is encoded as DELTA_BYTE_ARRAY, whose size is unknown"
                raise UsageError(f"{name}: {what}; write it with another encoding")
            if pages > MAX_PAGES:
                raise UsageError(f"{name}: more than {MAX_PAGES:,} pages in a row group; write larger ones")
            largest[is_dictionary] = max(largest[is_dictionary], size)
            total += size
            values += count
        together += sum(largest.values())
    if together > TOGETHER_BYTES or values > GROUP_VALUES:
        what = f"row group {group} has {values:,} values and {together:,} bytes in its largest pages"
        raise _too_large(name, what)
    return GroupSize(total, together)


def check_arrow(stored: pa.NativeFile, name: str) -> None:
    """Read the headers of an Arrow stream. Raises UsageError for a batch that is too large once decoded."""
    for message in pa.ipc.MessageReader.open_stream(stored):
        if message.body is not None and (size := _inflated(message)) > TOGETHER_BYTES:
            raise _too_large(name, f"a compressed batch has {size:,} bytes")


def _too_large(name: str, what: str) -> UsageError:
    return UsageError(f"{name}: {what} once decoded; write smaller row groups, pages or batches")


def _pages(stored: pa.NativeFile, column: Any, name: str) -> Iterator[tuple[int, int, bool, int]]:
    """(decoded bytes, values, whether it is a dictionary, encoding of the values) of each page of a column chunk."""
    at = column.data_page_offset
    if column.has_dictionary_page and 0 < (column.dictionary_page_offset or 0) < at:
        at = column.dictionary_page_offset
    end = min(at + column.total_compressed_size, stored.size())
    while at < end:
        header, length = _page_header(stored, at, name)
        packed, size = header.get(3, -1), header.get(2, -1)
        described = header.get(5) or header.get(7) or header.get(8) or {}
        if packed < 0 or size < 0:
            raise UsageError(f"{name}: damaged file: a page without a size")
        encoding = described.get(4 if 8 in header else 2, 0)
        yield size, described.get(1, 0), 7 in header, encoding
        at += length + packed


def _page_header(stored: pa.NativeFile, at: int, name: str) -> tuple[dict[int, Any], int]:
    """A page header's fields by number, and its length; statistics make some long."""
    size = _HEADER_BYTES
    while True:
        data = stored.read_at(size, at)
        try:
            return _Thrift(data).header()
        except (IndexError, ValueError, RecursionError):
            if len(data) < size or size >= _MAX_HEADER_BYTES:
                raise UsageError(f"{name}: damaged file: a page header cannot be read") from None
            size *= 16


class _Thrift:
    """Thrift's compact protocol, as far as page headers use it. Raises IndexError at the end of the data."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def header(self) -> tuple[dict[int, Any], int]:
        return self._struct(0), self._at

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _struct(self, depth: int) -> dict[int, Any]:
        if depth > 8:
            raise ValueError("nested too deeply")
        found: dict[int, Any] = {}
        number = 0
        while byte := self._byte():
            number = number + (byte >> 4) if byte >> 4 else self._integer()
            found[number] = self._value(byte & 15, depth)
        return found

    def _value(self, kind: int, depth: int) -> Any:
        match kind:
            case 1 | 2:
                return kind == 1
            case 3:
                return self._byte()
            case 4 | 5 | 6:
                return self._integer()
            case 7:
                self._at += 8
            case 8:
                length = self._varint()
                self._at += length
            case 9 | 10:
                byte = self._byte()
                for _ in range(byte >> 4 if byte >> 4 < 15 else self._varint()):
                    self._value(byte & 15, depth)
            case 12:
                return self._struct(depth + 1)
            case _:
                raise ValueError(f"an unknown type {kind}")
        if self._at > len(self._data):
            raise IndexError
        return None


def _inflated(message: pa.ipc.Message) -> int:
    """The decoded bytes of a message's compressed buffers: each starts with its size; -1 is not compressed."""
    try:
        batch = _Table.root(message.metadata.to_pybytes()).table(2)
        if message.type == "dictionary" and batch is not None:
            batch = batch.table(1)
        if batch is None or batch.table(3) is None:
            return 0
        body = memoryview(message.body)
        total = 0
        for offset, length in batch.structs(2, "<qq"):
            size = struct.unpack_from("<q", body, offset)[0] if length >= 8 else 0
            total += length if size < 0 else size
        return total
    except (struct.error, IndexError, ValueError):
        raise pa.ArrowInvalid("a batch without readable sizes") from None


@dataclass(frozen=True, slots=True)
class _Table:
    """A table in a flatbuffer."""

    data: bytes
    at: int

    @classmethod
    def root(cls, data: bytes) -> _Table:
        return cls(data, struct.unpack_from("<I", data)[0])

    def _field(self, number: int) -> int | None:
        fields = self.at - struct.unpack_from("<i", self.data, self.at)[0]
        if fields < 0 or 4 + 2 * number >= struct.unpack_from("<H", self.data, fields)[0]:
            return None
        offset = struct.unpack_from("<H", self.data, fields + 4 + 2 * number)[0]
        return self.at + offset if offset else None

    def table(self, number: int) -> _Table | None:
        """A field that is a table."""
        place = self._field(number)
        return None if place is None else _Table(self.data, place + struct.unpack_from("<I", self.data, place)[0])

    def structs(self, number: int, layout: str) -> Iterator[tuple[int, ...]]:
        """A field that is a vector of structs."""
        if (place := self._field(number)) is None:
            return
        start = place + struct.unpack_from("<I", self.data, place)[0]
        size = struct.calcsize(layout)
        for index in range(struct.unpack_from("<I", self.data, start)[0]):
            yield struct.unpack_from(layout, self.data, start + 4 + index * size)
