"""Reading units of work: every row with its number, its bytes, and a reason where it is not readable.

Values are not converted (dates, leading zeros and long integers survive), a bad row does not affect others, and at
most one unit is in memory. A unit is the same in a loop, in a Ray task and after a restart.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeVar

import pyarrow as pa

from reft_ray.core.errors import ReftError, UsageError, first_line
from reft_ray.screening import columnar
from reft_ray.screening.csv_records import csv_records, delimiter_of
from reft_ray.screening.inflating import check_rows
from reft_ray.screening.pieces import SPAN_BYTES, Piece, pieces_of
from reft_ray.screening.ranges import Cuts, Limits, Range, cut_lines, cut_text, joined
from reft_ray.screening.sources import Container, Source

Item = TypeVar("Item")
Result = TypeVar("Result")

ROWS = pa.schema(
    [
        pa.field("row_number", pa.int64(), nullable=False),
        pa.field("raw", pa.large_binary()),
        pa.field("reason", pa.string()),
    ]
)
"""One row of input: its bytes `raw` (null in columnar files) and the `reason` why it is bad (null when readable)."""

GROUP_BYTES = 16 << 20
_SHOWN = 1024


@dataclass(frozen=True, slots=True)
class FilePlan:
    """One input file, cut into ranges. Row numbers are unique over all files: those of the file plus `first_row`."""

    index: int
    source: Source
    cuts: Cuts
    first_row: int

    def unit_id(self, unit: Range) -> str:
        """The id of a unit; ids sort in row order, up to 100,000 files."""
        return f"{self.index:05d}-{unit.number:06d}"

    @property
    def head(self) -> FilePlan:
        """The plan of its first units, from which the format is detected."""
        return replace(self, cuts=replace(self.cuts, ranges=self.cuts.ranges[:3]))


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows of one range: `rows` has the schema ROWS, `native` the same rows as columns (columnar files only).

    A row that is too large has no columns.
    """

    id: str
    file: int
    rows: pa.Table
    native: pa.Table | None = None


class Mapper(Protocol):
    """Calls `work` on each of the items, here (`map`) or elsewhere, and gives the results in order."""

    def __call__(self, work: Callable[[Item], Result], items: Sequence[Item], /) -> Iterable[Result]: ...


def plan_files(
    sources: Sequence[Source], limits: Limits, each: Mapper = map, span_bytes: int = SPAN_BYTES
) -> list[FilePlan]:
    """Cut every file, in one pass over each that also finds damaged files before the work starts.

    The pieces of the files are cut by `each`; where makes no difference to the plan.
    """
    footers = any(source.container is Container.PARQUET for source in sources)
    by_source = (each if footers else map)(partial(pieces_of, span_bytes=span_bytes), sources)
    pieces = [piece for found in by_source for piece in found]
    cuts = zip(pieces, each(partial(_cut, limits=limits), pieces), strict=True)
    plans = []
    first_row = 0
    for index, (source, found) in enumerate(itertools.groupby(cuts, key=lambda pair: pair[0].source)):
        whole = joined([part for _, part in found], lines=source.container.textual)
        check_rows(whole.rows, source.size, source.name)
        plans.append(FilePlan(index, source, whole, first_row))
        first_row += whole.rows
    return plans


def plan_piece(piece: Piece, limits: Limits) -> FilePlan:
    """One piece as if it were a file; rows of Parquet keep their numbers in the file."""
    return FilePlan(0, piece.source, _cut(piece, limits), 0)


def _cut(piece: Piece, limits: Limits) -> Cuts:
    source = piece.source
    if not source.container.textual:
        return columnar.cut(piece, limits)
    if piece.end is None:
        return cut_text(source, limits, quoted=source.container is Container.CSV)
    return cut_lines(piece, limits)


def groups(plan: FilePlan, done: frozenset[str] = frozenset()) -> list[tuple[Range, ...]]:
    """The ranges left to do, grouped by what one reader reads at once: a whole file without random access (compressed,
    JSON, Arrow), about 16 MB of text, or a row group of Parquet."""
    wanted = [unit for unit in plan.cuts.ranges if plan.unit_id(unit) not in done]
    source = plan.source
    if source.container is Container.PARQUET:
        return columnar.parquet_groups(source, wanted)
    if source.compression or not source.container.textual:
        return [tuple(wanted)] if wanted else []
    buckets = itertools.groupby(wanted, key=lambda unit: unit.start // GROUP_BYTES)
    return [tuple(bucket) for _, bucket in buckets]


def read_units(plan: FilePlan, ranges: Sequence[Range]) -> Iterator[Unit]:
    """The units of these ranges, in order. Raises UsageError when the file can no longer be read."""
    try:
        if plan.source.container.textual:
            yield from _text_units(plan, ranges)
        elif plan.source.container is Container.JSON:
            yield from _json_units(plan, ranges)
        else:
            yield from _native_units(plan, ranges)
    except (OSError, pa.ArrowInvalid, MemoryError) as error:
        raise UsageError(f"{plan.source.name}: {first_line(error)}") from error


def rows_table(numbers: Iterable[int], raws: Sequence[bytes | None], reasons: Sequence[str | None] = ()) -> pa.Table:
    """Rows with the schema ROWS."""
    return pa.table(
        [
            pa.array(numbers, pa.int64()),
            pa.array(raws, pa.large_binary()),
            pa.array(reasons or [None] * len(raws), pa.string()),
        ],
        schema=ROWS,
    )


def read_bytes(plan: FilePlan, ranges: Sequence[Range]) -> bytes:
    """The bytes of ranges of a text file that follow each other."""
    with _Reader(plan.source) as reader:
        return reader.read(ranges[0].start, ranges[-1].end - ranges[0].start)


def _text_units(plan: FilePlan, ranges: Sequence[Range]) -> Iterator[Unit]:
    split: Callable[[bytes, int], Iterator[tuple[int, bytes]]] = json_lines
    if plan.source.container is Container.CSV:
        split = partial(csv_records, delimiter=delimiter_of(plan.cuts.header))
    with _Reader(plan.source) as reader:
        for unit in ranges:
            first = plan.first_row + unit.first_row
            if unit.too_large:
                head = reader.read(unit.start, min(_SHOWN, unit.end - unit.start))
                size = unit.end - unit.start
                table = rows_table([first], [head], [f"row_too_large: {size} bytes; the first are shown"])
            else:
                data = reader.read(unit.start, unit.end - unit.start)
                if len(data) != unit.end - unit.start:
                    raise ReftError(f"{plan.source.name}: the file became shorter while it was screened")
                numbered = list(split(data, first))
                table = rows_table([number for number, _ in numbered], [raw for _, raw in numbered])
            yield Unit(plan.unit_id(unit), plan.index, table)


def json_lines(data: bytes, first: int) -> Iterator[tuple[int, bytes]]:
    """Non-blank lines with their numbers, without the line feed; a carriage return is kept."""
    for number, line in enumerate(data.split(b"\n"), start=first):
        if line and not line.isspace():
            yield number, line


def _json_units(plan: FilePlan, ranges: Sequence[Range]) -> Iterator[Unit]:
    elements = columnar.json_elements(plan.source)
    position = 0
    for unit in ranges:
        raws = list(itertools.islice(elements, unit.start - position, unit.end - position))
        numbers = range(plan.first_row + unit.first_row, plan.first_row + unit.first_row + len(raws))
        yield Unit(plan.unit_id(unit), plan.index, rows_table(numbers, raws))
        position = unit.end


def _native_units(plan: FilePlan, ranges: Sequence[Range]) -> Iterator[Unit]:
    for unit, native in columnar.tables(plan.source, ranges):
        first = plan.first_row + unit.first_row
        if native is None:
            rows = rows_table([first], [b""], ["row_too_large: more bytes than a row may have; none are shown"])
        else:
            rows = rows_table(range(first, first + native.num_rows), [None] * native.num_rows)
        yield Unit(plan.unit_id(unit), plan.index, rows, native)


class _Reader:
    """Reads at increasing offsets: seeks in plain files, skips forward in compressed ones."""

    def __init__(self, source: Source) -> None:
        self._file = source.stream()
        self._position = 0

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, offset: int, size: int) -> bytes:
        """At most `size` bytes from `offset`, fewer only at the end of the file."""
        if isinstance(self._file, pa.NativeFile):
            return bytes(self._file.read_at(size, offset))
        while self._position < offset:
            skipped = self._file.read(min(offset - self._position, 1 << 20))
            if not skipped:
                return b""
            self._position += len(skipped)
        data = bytearray()
        while len(data) < size and (more := self._file.read(size - len(data))):
            data += more
        self._position += len(data)
        return bytes(data)
