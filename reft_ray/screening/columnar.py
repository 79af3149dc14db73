"""JSON arrays, Parquet and Arrow files: ranges count rows instead of bytes."""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from reft_ray.core.errors import UsageError, first_line
from reft_ray.rows.diagnosis import FIX, broken_at
from reft_ray.screening.decoded_sizes import TOGETHER_BYTES, check_arrow, group_size
from reft_ray.screening.pieces import Piece
from reft_ray.screening.ranges import CHUNK, Cuts, Limits, Range
from reft_ray.screening.sources import Container, Source

_SPACE = re.compile(r"[ \t\r\n]*")
_ARROW_FILE = b"ARROW1"
_ARROW_HEAD = 8
_COMPACT_BYTES = 64 << 20
_COMPACT_FILE = 16 << 20
_COMPACT_ROWS = 65_536
_PLAIN_ROWS = 64
_CELL = 8
"""Bytes of a cell without its text: a pointer or a number."""


def cut(piece: Piece, limits: Limits) -> Cuts:
    """The ranges of a JSON or Arrow file, or of row groups of a Parquet file; rows count from the file's first."""
    source = piece.source
    try:
        if source.container is Container.PARQUET:
            return _cut_parquet(piece, limits)
        if source.container is Container.JSON:
            return _cut_elements((len(raw) for raw in json_elements(source, limits.row_bytes)), limits)
        with source.open() as stored:
            _start_of_arrow(stored)
            check_arrow(stored, source.name)
            schema, batches = _arrow_batches(stored)
            _check_columns(schema, source.name)
            return _cut_blocks(map(row_sizes, batches), limits)
    # Arrow has an error of its own for memory that it does not get.
    except (OSError, pa.ArrowInvalid, MemoryError) as error:
        raise UsageError(f"{source.name}: damaged file: {first_line(error)}") from error


def tables(source: Source, ranges: Sequence[Range]) -> Iterator[tuple[Range, pa.Table | None]]:
    """Each range of a Parquet or Arrow file as a table; None for a row that is too large."""
    if not ranges:
        return
    with source.open() as stored:
        if source.container is Container.PARQUET:
            schema, first, batches = _parquet_batches(stored, ranges, source.name)
        else:
            first, (schema, batches) = 0, _arrow_batches(stored)
        for unit, table in _sliced(batches, first, ranges):
            yield unit, None if unit.too_large else _plain(table, schema).combine_chunks()


def parquet_groups(source: Source, wanted: Sequence[Range]) -> list[tuple[Range, ...]]:
    """Ranges grouped by row group; no range crosses one."""
    with source.open() as stored:
        ends = _group_ends(pq.ParquetFile(stored))
    grouped = itertools.groupby(wanted, key=lambda unit: sum(end <= unit.start for end in ends))
    return [tuple(group) for _, group in grouped]


def json_elements(source: Source, row_bytes: int = 1 << 62, lenient: bool = False) -> Iterator[bytes]:
    """The exact text of each dictionary in a JSON array, or of dictionaries one after the other, read as a stream.

    `lenient` accepts a comma before the closing bracket.
    Raises UsageError at the first malformed element: where the next one starts is unknown.
    """
    with source.stream() as stream:
        text = _Scanner(stream, source.name, row_bytes)
        if text.peek() != "[":
            while text.peek():
                yield text.element().encode()
            return
        text.skip("[", "")
        while text.peek() != "]":
            yield text.element().encode()
            if text.peek() != "]":
                text.skip(",", "an element is not followed by , or ]")
                if text.peek() == "]" and not lenient:
                    raise text.error("a comma before ]")
        text.skip("]", "")
        if text.peek():
            raise text.error("text after the closing ]")


class _Scanner:
    """Scans a stream of JSON text token by token."""

    def __init__(self, stream: pa.NativeFile, name: str, row_bytes: int) -> None:
        self._stream = stream
        self._name = name
        self._row_bytes = row_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._elements = 0
        self._lines = 1  # the line of `_text`'s first character
        self._column = 1  # and its column

    def error(self, what: str, at: int | None = None) -> UsageError:
        before = self._text[: self._at if at is None else at]
        line = self._lines + before.count("\n")
        column = len(before) - before.rfind("\n") if "\n" in before else self._column + len(before)
        hint = f"a bad row ends JSON text; in JSONL it alone is reported: {FIX} repairs it or names every error"
        place = f"line {line}, column {column}, near element {self._elements + 1}"
        return UsageError(f"{self._name}: {place}: {what} ({hint})")

    def peek(self) -> str:
        """The next character other than white space; empty at the end of the file."""
        while True:
            match = _SPACE.match(self._text, self._at)
            self._at = match.end() if match else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def skip(self, char: str, problem: str) -> None:
        if self.peek() != char:
            raise self.error(problem)
        self._at += 1

    def element(self) -> str:
        if self.peek() != "{":
            raise self.error("an element is not a dictionary")
        while True:
            try:
                _, end = self._json.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                if len(self._text) - self._at > self._row_bytes:
                    raise self.error("a row over the size limit, or malformed JSON") from None
                if not self._more():
                    raise self._malformed(error) from None
            else:
                element = self._text[self._at : end]
                self._at = end
                self._elements += 1
                return element

    def _malformed(self, error: ValueError | RecursionError) -> UsageError:
        if not isinstance(error, json.JSONDecodeError):
            return self.error("JSON that is nested too deeply")
        return self.error(broken_at(self._text, error.pos)[0], error.pos)

    def _more(self) -> bool:
        chunk = bytes(self._stream.read(CHUNK))
        done = self._text[: self._at]
        self._lines += done.count("\n")
        self._column = len(done) - done.rfind("\n") if "\n" in done else self._column + len(done)
        try:
            self._text = self._text[self._at :] + self._utf8.decode(chunk, final=not chunk)
        except UnicodeDecodeError:
            raise self.error("bytes that are not UTF-8") from None
        self._at = 0
        return bool(chunk)


def _plain(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A slice with the types of the file, which `_RowGroups` may have changed to dictionaries."""
    if table.schema.equals(schema):
        return table
    # A cast converts all values of a list, also those outside of the slice: copy the rows first.
    batches = (batch.take(pa.array(range(batch.num_rows))) for batch in table.to_batches())
    return pa.concat_tables(pa.Table.from_batches([batch]).cast(schema) for batch in batches)


def _cut_elements(sizes: Iterator[int], limits: Limits) -> Cuts:
    """Ranges over rows, given their sizes in bytes."""
    bounds = [0]
    rows = held = 0
    for size in sizes:
        if rows > bounds[-1] and (rows - bounds[-1] >= limits.rows or held + size > limits.bytes):
            bounds.append(rows)
            held = 0
        rows += 1
        held += size
    if rows > bounds[-1]:
        bounds.append(rows)
    pairs = itertools.pairwise(bounds)
    return Cuts(tuple(Range(index, start, end, start + 1) for index, (start, end) in enumerate(pairs)), rows)


def _cut_blocks(blocks: Iterator[np.ndarray], limits: Limits, skipped: int = 0) -> Cuts:
    """Ranges over blocks of rows after the `skipped` ones, given their sizes in bytes; none crosses the end of a
    block."""
    ranges: list[Range] = []
    first = skipped
    for sizes_N in blocks:
        ends_N = np.cumsum(sizes_N)
        start = taken = 0
        while start < len(sizes_N):
            fitting = int(np.searchsorted(ends_N, taken + limits.bytes, side="right"))
            end = min(max(fitting, start + 1), start + limits.rows)
            too_large = int(sizes_N[start]) > limits.row_bytes
            ranges.append(Range(len(ranges), first + start, first + end, first + start + 1, too_large))
            start, taken = end, int(ends_N[end - 1])
        first += len(sizes_N)
    return Cuts(tuple(ranges), first - skipped)


def _cut_parquet(piece: Piece, limits: Limits) -> Cuts:
    with piece.source.open() as stored:
        groups = _RowGroups(stored, piece.source.name)
        _check_columns(groups.file.schema_arrow, piece.source.name)
        wanted = range(piece.start, piece.end or groups.file.num_row_groups)
        first = [0, *_group_ends(groups.file)][piece.start]
        return _cut_blocks(map(groups.sizes, wanted), limits, first)


class _RowGroups:
    """The rows of a Parquet file by row group. Texts of a small group are read as dictionaries, so that a text that is
    stored once is in memory once; a large group is read plainly, a few rows at a time, since dictionaries grow with
    the group. Pages are checked before they are decoded."""

    def __init__(self, stored: pa.NativeFile, name: str) -> None:
        self.file = pq.ParquetFile(stored)
        self._stored, self._name = stored, name
        leaves = (self.file.schema.column(index) for index in range(len(self.file.schema)))
        texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
        self._compact = pq.ParquetFile(stored, metadata=self.file.metadata, read_dictionary=texts)
        self._small = stored.size() <= _COMPACT_FILE

    def batches(self, group: int) -> Iterator[pa.RecordBatch]:
        size = group_size(self._stored, self.file.metadata, group, self._name)
        if size.total <= (TOGETHER_BYTES if self._small else _COMPACT_BYTES):
            return self._compact.iter_batches(batch_size=_COMPACT_ROWS, row_groups=[group])
        rows = min(_PLAIN_ROWS, max(1, TOGETHER_BYTES // size.together))
        return self.file.iter_batches(batch_size=rows, row_groups=[group])

    def sizes(self, group: int) -> np.ndarray:
        return np.concatenate([np.empty(0, dtype=np.int64), *map(row_sizes, self.batches(group))])


def _group_ends(file: pq.ParquetFile) -> list[int]:
    counts = (file.metadata.row_group(index).num_rows for index in range(file.metadata.num_row_groups))
    return list(itertools.accumulate(counts))


def _parquet_batches(
    stored: pa.NativeFile, ranges: Sequence[Range], name: str
) -> tuple[pa.Schema, int, Iterator[pa.RecordBatch]]:
    """The schema of the file, the number of the first row, and batches from there; none crosses a row group."""
    groups = _RowGroups(stored, name)
    ends = _group_ends(groups.file)
    wanted = [
        index
        for index, end in enumerate(ends)
        if end > ranges[0].start and (ends[index - 1] if index else 0) < ranges[-1].end
    ]
    first = ends[wanted[0] - 1] if wanted and wanted[0] else 0
    return groups.file.schema_arrow, first, itertools.chain.from_iterable(map(groups.batches, wanted))


def _arrow_batches(stored: pa.NativeFile) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    _start_of_arrow(stored)
    stream = pa.ipc.open_stream(stored)
    return stream.schema, iter(stream)


def _start_of_arrow(stored: pa.NativeFile) -> None:
    """Go to the stream in an Arrow file; its footer, which may name any bytes as a batch, is not read."""
    stored.seek(0)
    stored.seek(_ARROW_HEAD if stored.read(len(_ARROW_FILE)) == _ARROW_FILE else 0)


def _check_columns(schema: pa.Schema, name: str) -> None:
    """Raise UsageError for columns (or fields of one) with the same name, of which readers take different ones, and for
    types whose values have no known size."""
    pending = [list(schema)]
    while pending:
        fields = pending.pop()
        names = Counter(field.name for field in fields)
        for field in fields:
            if names[field.name] > 1:
                message = f"{names[field.name]} columns are named {field.name[:40]}; rename or drop all but one"
                raise UsageError(f"{name}: {message}")
            kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
            if not is_bounded(kind):
                raise UsageError(f"{name}: column {field.name[:40]} is of the type {str(kind)[:40]}; cast or drop it")
            pending.append([kind.field(index) for index in range(kind.num_fields)])


def _sliced(batches: Iterator[pa.RecordBatch], first: int, ranges: Sequence[Range]) -> Iterator[tuple[Range, pa.Table]]:
    held: list[pa.RecordBatch] = []
    for unit in ranges:
        end = first + sum(batch.num_rows for batch in held)
        while end < unit.end and (batch := next(batches, None)) is not None:
            held.append(batch)
            end += batch.num_rows
            while held and first + held[0].num_rows <= unit.start:
                first += held.pop(0).num_rows
        if not held:
            raise UsageError("the file became shorter while it was screened")
        yield unit, pa.Table.from_batches(held).slice(unit.start - first, unit.end - unit.start)
        while held and first + held[0].num_rows <= unit.end:
            first += held.pop(0).num_rows


def row_sizes(batch: pa.RecordBatch) -> np.ndarray:
    """Minimum bytes of each row as Python values; a dictionary value counts in every row that refers to it."""
    sizes_N = np.zeros(batch.num_rows, dtype=np.int64)
    for column in batch.columns:
        sizes_N += _sizes(column)
    return sizes_N


def _sizes(array: pa.Array) -> np.ndarray:
    kind = array.type
    if pa.types.is_dictionary(kind):
        known_N = array.is_valid().to_numpy(zero_copy_only=False)
        sizes_N = np.full(len(array), _CELL, dtype=np.int64)
        sizes_N[known_N] = _sizes(array.dictionary)[array.indices.drop_null().to_numpy()]
        return sizes_N
    if pa.types.is_struct(kind):
        return sum((_sizes(child) for child in array.flatten()), np.full(len(array), _CELL, dtype=np.int64))
    if pa.types.is_fixed_size_list(kind):
        cells = array.values.slice(array.offset * kind.list_size, len(array) * kind.list_size)
        return _sizes(cells).reshape(len(array), kind.list_size).sum(axis=1) + _CELL
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_map(kind):
        ends = np.concatenate([[0], np.cumsum(_sizes(array.values))])
        return np.diff(ends[array.offsets.to_numpy()]) + _CELL
    if is_text(kind):
        return pc.binary_length(array).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64) + _CELL
    return np.full(len(array), _CELL, dtype=np.int64)


def is_text(kind: pa.DataType) -> bool:
    """Whether values of a type are strings or bytes of any length."""
    types = pa.types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind)


def is_bounded(kind: pa.DataType) -> bool:
    """Whether the bytes of values of a type are known before they are converted."""
    if isinstance(kind, pa.BaseExtensionType):
        return not is_text(kind.storage_type) and not pa.types.is_nested(kind.storage_type)
    types = pa.types
    views = types.is_string_view(kind) or types.is_binary_view(kind)
    views = views or types.is_list_view(kind) or types.is_large_list_view(kind)
    return not (views or types.is_union(kind) or types.is_run_end_encoded(kind))
