"""Files that are not lines: JSON arrays, Parquet and Arrow; their rows are counted, not located by byte."""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from reft_ray.core.errors import UsageError
from reft_ray.screening.ranges import CHUNK, Cuts, Limits, Range
from reft_ray.screening.sources import Container, Source

_SPACE = re.compile(r"[ \t\r\n]*")
_ARROW_FILE = b"ARROW1"


def cut(source: Source, limits: Limits) -> Cuts:
    """The ranges of a JSON, Parquet or Arrow file."""
    try:
        if source.container is Container.PARQUET:
            return _cut_parquet(source, limits)
        if source.container is Container.JSON:
            sizes = (len(raw) for raw in json_elements(source, limits.row_bytes))
            return _cut_blocks(((1, size) for size in sizes), limits, split_blocks=False)
        with source.open() as stored:
            schema, batches = _arrow_batches(stored)
            _check_names(schema, source.name)
            return _cut_blocks(((batch.num_rows, batch.nbytes) for batch in batches), limits)
    except (OSError, pa.ArrowInvalid) as error:
        raise UsageError(f"{source.name}: damaged file: {str(error).splitlines()[0]}") from error


def tables(source: Source, ranges: Sequence[Range]) -> Iterator[tuple[Range, pa.Table]]:
    """Each range of a Parquet or Arrow file as a table of its own."""
    if not ranges:
        return
    with source.open() as stored:
        if source.container is Container.PARQUET:
            first, batches = _parquet_batches(stored, ranges)
        else:
            first, (_, batches) = 0, _arrow_batches(stored)
        yield from _sliced(batches, first, ranges)


def parquet_groups(source: Source, wanted: Sequence[Range]) -> list[tuple[Range, ...]]:
    """Ranges that lie in the same row group; no range crosses one."""
    with source.open() as stored:
        ends = _group_ends(pq.ParquetFile(stored))
    grouped = itertools.groupby(wanted, key=lambda unit: sum(end <= unit.start for end in ends))
    return [tuple(group) for _, group in grouped]


def json_elements(source: Source, row_bytes: int = 1 << 62) -> Iterator[bytes]:
    """The exact text of each element of a JSON array of dictionaries, in order, read as a stream.

    Raises UsageError at the first malformed element: past it, nobody can tell where the next one starts.
    """
    with source.stream() as stream:
        text = _Scanner(stream, source.name, row_bytes)
        text.skip("[", "the file does not start with [")
        while text.peek() != "]":
            yield text.element().encode()
            if text.peek() != "]":
                text.skip(",", "an element is not followed by , or ]")
        text.skip("]", "")
        if text.peek():
            raise text.error("text after the closing ]")


class _Scanner:
    """A window on a stream of JSON text that moves one token at a time."""

    def __init__(self, stream: pa.NativeFile, name: str, row_bytes: int) -> None:
        self._stream = stream
        self._name = name
        self._row_bytes = row_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._elements = 0

    def error(self, what: str) -> UsageError:
        hint = "JSONL files are screened past bad rows, JSON arrays cannot be"
        return UsageError(f"{self._name}: {what} near element {self._elements + 1} ({hint})")

    def peek(self) -> str:
        """The next character that is not white space; empty at the end of the file."""
        while True:
            match = _SPACE.match(self._text, self._at)
            self._at = match.end() if match else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def skip(self, char: str, complaint: str) -> None:
        if self.peek() != char:
            raise self.error(complaint)
        self._at += 1

    def element(self) -> str:
        if self.peek() != "{":
            raise self.error("an element is not a dictionary")
        while True:
            try:
                _, end = self._json.raw_decode(self._text, self._at)
            except (ValueError, RecursionError):
                if len(self._text) - self._at > self._row_bytes or not self._more():
                    raise self.error("malformed JSON, or a row over the size limit,") from None
            else:
                element = self._text[self._at : end]
                self._at = end
                self._elements += 1
                return element

    def _more(self) -> bool:
        chunk = bytes(self._stream.read(CHUNK))
        try:
            self._text = self._text[self._at :] + self._utf8.decode(chunk, final=not chunk)
        except UnicodeDecodeError:
            raise self.error("bytes that are not UTF-8") from None
        self._at = 0
        return bool(chunk)


def _cut_blocks(blocks: Iterator[tuple[int, int]], limits: Limits, split_blocks: bool = True) -> Cuts:
    """Ranges over blocks of (rows, bytes): either each block is cut on its own, or small ones are collected."""
    bounds = [0]
    rows = size = 0
    for block_rows, block_bytes in blocks:
        if split_blocks:
            step = max(1, min(limits.rows, block_rows * limits.bytes // max(block_bytes, 1)))
            bounds += [min(start + step, rows + block_rows) for start in range(rows, rows + block_rows, step)]
        elif rows > bounds[-1] and (rows - bounds[-1] >= limits.rows or size + block_bytes > limits.bytes):
            bounds.append(rows)
            size = 0
        rows += block_rows
        size += block_bytes
    if rows > bounds[-1]:
        bounds.append(rows)
    pairs = itertools.pairwise(bounds)
    return Cuts(tuple(Range(index, start, end, start + 1) for index, (start, end) in enumerate(pairs)), rows)


def _cut_parquet(source: Source, limits: Limits) -> Cuts:
    with source.open() as stored:
        file = pq.ParquetFile(stored)
        _check_names(file.schema_arrow, source.name)
        metadata = file.metadata
        described = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        return _cut_blocks(((group.num_rows, group.total_byte_size) for group in described), limits)


def _group_ends(file: pq.ParquetFile) -> list[int]:
    counts = (file.metadata.row_group(index).num_rows for index in range(file.metadata.num_row_groups))
    return list(itertools.accumulate(counts))


def _parquet_batches(stored: pa.NativeFile, ranges: Sequence[Range]) -> tuple[int, Iterator[pa.RecordBatch]]:
    file = pq.ParquetFile(stored)
    ends = _group_ends(file)
    wanted = [
        index
        for index, end in enumerate(ends)
        if end > ranges[0].start and (ends[index - 1] if index else 0) < ranges[-1].end
    ]
    first = ends[wanted[0] - 1] if wanted and wanted[0] else 0
    return first, file.iter_batches(batch_size=max(unit.end - unit.start for unit in ranges), row_groups=wanted)


def _arrow_batches(stored: pa.NativeFile) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    head = stored.read(len(_ARROW_FILE))
    stored.seek(0)
    if head == _ARROW_FILE:
        reader = pa.ipc.open_file(stored)
        return reader.schema, map(reader.get_batch, range(reader.num_record_batches))
    stream = pa.ipc.open_stream(stored)
    return stream.schema, iter(stream)


def _check_names(schema: pa.Schema, name: str) -> None:
    """Raises UsageError where two columns, or two fields of one, share a name: a reader takes either."""
    pending = [list(schema)]
    while pending:
        fields = pending.pop()
        names = Counter(field.name for field in fields)
        for column, count in names.items():
            if count > 1:
                raise UsageError(f"{name}: {count} columns are named {column[:40]}; rename or drop all but one")
        for field in fields:
            kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
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
        table = pa.Table.from_batches(held).slice(unit.start - first, unit.end - unit.start)
        yield unit, table.combine_chunks()
        while held and first + held[0].num_rows <= unit.end:
            first += held.pop(0).num_rows
