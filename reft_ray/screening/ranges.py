"""Cutting text files into units of work at row boundaries, with exact line numbers.

One pass over the file finds line ends at memory speed (and quotes in CSV, slower). It gives every unit its first byte
and first line, so that units are read in any order and more than once, and row numbers are line numbers. The pieces of
a JSONL file are passed over apart from each other; no unit crosses the end of one.
"""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from reft_ray.core.errors import UsageError, first_line
from reft_ray.screening.csv_records import Quotes, delimiter_of, without_mark
from reft_ray.screening.pieces import Piece, first_byte
from reft_ray.screening.sources import Source

CHUNK = 8 << 20
_REST = 1 << 16
_NEWLINE = 10


@dataclass(frozen=True, slots=True)
class Limits:
    """Maximum size of a unit (`rows` or `bytes`, whichever comes first) and of a row."""

    rows: int = 2_000
    bytes: int = 4 << 20
    row_bytes: int = 16 << 20

    def __post_init__(self) -> None:
        if not (self.rows >= 1 and 1 <= self.bytes <= self.row_bytes):
            raise UsageError(f"limits need rows >= 1 and 1 <= bytes <= row_bytes, got {self}")


@dataclass(frozen=True, slots=True)
class Range:
    """A unit of work: the rows between `start` and `end`, which count bytes of text or rows of anything else.

    `first_row` is the number of its first row in the file, from 1; in text files a line number. `too_large` marks a
    single row over the limit, which is not read into memory.
    """

    number: int
    start: int
    end: int
    first_row: int
    too_large: bool = False


@dataclass(frozen=True, slots=True)
class Cuts:
    """The ranges of one file. `rows` is its number of rows (of lines, in text files)."""

    ranges: tuple[Range, ...]
    rows: int
    header: bytes = b""
    warnings: tuple[str, ...] = ()


def cut_text(source: Source, limits: Limits, quoted: bool) -> Cuts:
    """Cut a whole JSONL file, or (`quoted`) a CSV file, which has quoted line breaks and a header row."""
    cutter = _Cutter(limits, header=quoted)
    warnings: tuple[str, ...] = ()
    records: _RecordEnds | None = None
    total = 0
    for chunk in _chunks(source):
        if total == 0:
            marked = chunk.startswith(codecs.BOM_UTF8)
            warnings = _warnings(marked, chunk)
            cutter.begin(len(codecs.BOM_UTF8) if marked else 0)
            records = _RecordEnds(delimiter_of(chunk), limits.row_bytes) if quoted else None
        bytes_C = np.frombuffer(chunk, dtype=np.uint8)
        ends_L = np.flatnonzero(bytes_C == _NEWLINE) + (total + 1)
        cutter.feed(records.among(ends_L, chunk) if records else ends_L, ends_L)
        total += len(chunk)
    ranges, lines = cutter.finish(total)
    return Cuts(ranges, lines, _header(source, cutter.header, limits), warnings)


def cut_lines(piece: Piece, limits: Limits) -> Cuts:
    """Cut the lines that start in a piece of JSONL; their numbers count from its first one."""
    cutter = _Cutter(limits, header=False)
    warnings: tuple[str, ...] = ()
    size, end = piece.source.size, piece.end or 0
    with _readable(piece.source), piece.source.open() as stored:
        first = at = first_byte(stored, piece)
        cutter.begin(at)
        while first < end and (chunk := bytes(stored.read_at(_next_bytes(at, end, size), at))):
            if at == first and piece.start == 0:
                warnings = _warnings(at > 0, chunk)
            ends_L = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == _NEWLINE) + (at + 1)
            at += len(chunk)
            last = int(np.searchsorted(ends_L, end))
            if last < len(ends_L):  # the last line of the piece ends here
                at = int(ends_L[last])
                cutter.feed(ends_L[: last + 1], ends_L[: last + 1])
                break
            cutter.feed(ends_L, ends_L)
    ranges, lines = cutter.finish(at)
    return Cuts(ranges, lines, warnings=warnings)


def _next_bytes(at: int, end: int, size: int) -> int:
    """What to read next of a piece: up to its end, then the rest of its last line in small steps."""
    return min(CHUNK, end - at) if at < end else min(_REST, size - at)


def joined(parts: Sequence[Cuts], lines: bool) -> Cuts:
    """The cuts of the pieces of a file as those of the file; with `lines`, first rows count from each piece's first."""
    ranges: list[Range] = []
    rows = 0
    for part in parts:
        before = rows if lines else 0
        first = len(ranges)
        ranges += [replace(unit, number=first + unit.number, first_row=before + unit.first_row) for unit in part.ranges]
        rows += part.rows
    return Cuts(tuple(ranges), rows, parts[0].header, parts[0].warnings)


class _RecordEnds:
    """The line ends that end a CSV record, chunk by chunk. Quotes are only counted in a line over the limit, which is
    not kept."""

    def __init__(self, delimiter: bytes, line_bytes: int) -> None:
        self._quotes = Quotes(delimiter)
        self._line_bytes = line_bytes
        self._line = bytearray()  # the start of the next line
        self._counted = 0  # quotes in a line over the limit
        self._first = True

    def among(self, ends_L: np.ndarray, chunk: bytes) -> np.ndarray:
        """Those of the line ends of a chunk that end a record."""
        if not (self._quotes.open or self._counted or b'"' in chunk or b'"' in self._line):
            if len(ends_L):
                self._line.clear()
                self._first = False
            self._hold(chunk[chunk.rfind(b"\n") + 1 :])
            return ends_L
        *lines, rest = chunk.split(b"\n")
        ended = []
        for line in lines:
            self._hold(line)
            ended.append(self._end_line())
        self._hold(rest)
        return ends_L[np.array(ended, dtype=bool)]

    def _hold(self, piece: bytes) -> None:
        if self._counted or len(self._line) + len(piece) > self._line_bytes:
            self._counted += self._line.count(b'"') + piece.count(b'"') + (not self._counted) * 2
            self._line.clear()
        else:
            self._line += piece

    def _end_line(self) -> bool:
        line, counted = bytes(self._line), self._counted
        self._line.clear()
        self._counted = 0
        if counted:
            self._quotes.open ^= counted % 2 == 1
            return not self._quotes.open
        first, self._first = self._first, False
        return self._quotes.feed(without_mark(line) if first else line)


class _Cutter:
    """Groups row ends into ranges, chunk by chunk; `header` is the byte range of the header row, if any."""

    def __init__(self, limits: Limits, header: bool) -> None:
        self.header: tuple[int, int] | None = None
        self._limits = limits
        self._wants_header = header
        self._ranges: list[Range] = []
        self._start = self._last_end = 0
        self._rows = 0  # complete rows between the start of the open range and the last row end
        self._lines = 0  # line ends in earlier chunks
        self._lines_before = 0  # line ends before the start of the open range

    def begin(self, start: int) -> None:
        """Skip the first `start` bytes of the file."""
        self._start = self._last_end = start

    def feed(self, ends_R: np.ndarray, ends_L: np.ndarray) -> None:
        """Ends of rows and of lines in the next chunk, as offsets in the file, each one past its line feed."""
        taken = 0
        if self._wants_header and len(ends_R):
            self._wants_header = False
            self.header = (self._start, int(ends_R[0]))
            self._open_at(int(ends_R[0]), ends_L)
            taken = 1
        while taken < len(ends_R):
            by_rows = taken + self._limits.rows - self._rows
            by_bytes = int(np.searchsorted(ends_R, self._start + self._limits.bytes)) + 1
            stop = min(by_rows, max(by_bytes, taken + 1))
            if stop > len(ends_R):
                self._rows += len(ends_R) - taken
                self._last_end = int(ends_R[-1])
                break
            before = int(ends_R[stop - 2]) if stop - 2 >= taken else self._last_end
            end = int(ends_R[stop - 1])
            rows = self._rows + stop - taken
            if end - before > self._limits.row_bytes and rows > 1:
                self._close(before, ends_L, rows - 1)
                rows = 1
            self._close(end, ends_L, rows)
            taken = stop
        self._lines += len(ends_L)

    def finish(self, total: int) -> tuple[tuple[Range, ...], int]:
        """The ranges and the number of lines of a file of `total` bytes; its last row may lack the line feed."""
        none = np.empty(0, dtype=np.int64)
        if total > self._last_end:
            self.feed(np.array([total]), np.array([total]))
        if self._rows:
            self._close(self._last_end, none, self._rows)
        return tuple(self._ranges), self._lines

    def _close(self, end: int, ends_L: np.ndarray, rows: int) -> None:
        too_large = rows == 1 and end - self._start > self._limits.row_bytes
        self._ranges.append(Range(len(self._ranges), self._start, end, self._lines_before + 1, too_large))
        self._open_at(end, ends_L)

    def _open_at(self, start: int, ends_L: np.ndarray) -> None:
        self._lines_before = self._lines + int(np.searchsorted(ends_L, start, side="right"))
        self._start = self._last_end = start
        self._rows = 0


def _header(source: Source, place: tuple[int, int] | None, limits: Limits) -> bytes:
    if place is None:
        return b""
    begin, end = place
    if end - begin > limits.row_bytes:
        raise UsageError(f"{source.name}: the header row is longer than {limits.row_bytes} bytes")
    with source.stream() as stream:
        return bytes(stream.read(end))[begin:]


@contextlib.contextmanager
def _readable(source: Source) -> Iterator[None]:
    """Raise UsageError where the file cannot be read."""
    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        raise UsageError(f"{source.name}: cannot be read to its end: {first_line(error)}") from error


def _chunks(source: Source) -> Iterator[bytes]:
    with _readable(source), source.stream() as stream:
        while chunk := stream.read(CHUNK):
            yield chunk


def _warnings(marked: bool, head: bytes) -> tuple[str, ...]:
    found = []
    if marked:
        found.append("byte-order mark at the start of the file, left out of the kept rows")
    if b"\r\n" in head:
        found.append("CRLF line ends, kept as they are")
    return tuple(found)
