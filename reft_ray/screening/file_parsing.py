"""From the bytes or columns of a unit to rows as dictionaries, for each file format."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pyarrow as pa

from reft_ray.core.errors import UsageError
from reft_ray.rows.checks import Fault
from reft_ray.rows.diagnosis import utf8_fault
from reft_ray.rows.format import Format, Row, detect, printable, rename_columns
from reft_ray.rows.reader import DETECTION_ROWS, ChatRow, RowReader, parse_row
from reft_ray.rows.turns import SPEAKERS
from reft_ray.screening.csv_records import delimiter_of
from reft_ray.screening.reading import FilePlan, Unit, read_units
from reft_ray.screening.sources import Container

SHOWN_FAULTS = 3
_UNREADABLE = (ValueError, ArithmeticError, LookupError, pa.ArrowException)
"""Errors of Arrow and Python for values that one of them cannot hold."""


@dataclass(frozen=True, slots=True)
class FileShape:
    """How to parse the units of one file; without credentials, so that it may be sent and stored."""

    index: int
    name: str
    container: Container
    compression: str | None
    first_row: int
    format: Format
    header: bytes = b""


def parse_unit(unit: Unit, container: Container, header: bytes = b"") -> list[Row | Fault]:
    """Every row of a unit as a dictionary, or its fault, in order.

    Raises UsageError for a CSV header that does not name its columns.
    """
    if unit.native is not None:
        return _native_rows(unit.native)
    raws = unit.rows["raw"].to_pylist()
    reasons = unit.rows["reason"].to_pylist()
    parse = _CsvParser(header) if container is Container.CSV else parse_row
    return [
        parse(raw) if reason is None else Fault("", *reason.split(": ", 1))
        for raw, reason in zip(raws, reasons, strict=True)
    ]


def validated_rows(
    unit: Unit, shape: FileShape, reader: RowReader
) -> Iterator[tuple[int, bytes | None, ChatRow | list[Fault]]]:
    """(number, bytes, the row or all its faults) of every row of a unit, in order; no bytes in columnar files."""
    numbers, raws = unit.rows["row_number"].to_pylist(), unit.rows["raw"].to_pylist()
    if shape.container is Container.JSONL and unit.rows["reason"].null_count == len(raws):
        for number, raw in zip(numbers, raws, strict=True):
            yield number, raw, reader.read_line(raw)
        return
    for number, raw, row in zip(numbers, raws, parse_unit(unit, shape.container, shape.header), strict=True):
        yield number, raw, [row] if isinstance(row, Fault) else reader.read(row, raw)


def shape_of(
    plan: FilePlan, fmt: Format | None, columns: Mapping[str, str], speakers: Mapping[str, str] | None = None
) -> FileShape:
    """The shape of a file; without `fmt` the format is detected from the first rows, if there are any.

    Raises UsageError for an ambiguous or unknown format, a wrong CSV header, or a file whose first rows are all faulty.
    """
    source, header = plan.source, plan.cuts.header
    if source.container is Container.CSV:
        try:
            _CsvParser(header)
        except UsageError as error:
            raise UsageError(f"{source.name}: {error}") from None
    found = fmt or _detected(plan, columns, {**SPEAKERS, **(speakers or {})})
    return FileShape(plan.index, source.name, source.container, source.compression, plan.first_row, found, header)


def _detected(plan: FilePlan, columns: Mapping[str, str], speakers: Mapping[str, str]) -> Format:
    name = plan.source.name
    sample: list[Row] = []
    faults: list[tuple[int, Fault]] = []
    for unit in read_units(plan, plan.cuts.ranges[:3]):
        rows = parse_unit(unit, plan.source.container, plan.cuts.header)
        numbers = (number - plan.first_row for number in unit.rows["row_number"].to_pylist())
        for number, row in zip(numbers, rows, strict=True):
            if isinstance(row, Fault):
                faults.append((number, row))
            else:
                sample.append(rename_columns(row, columns))
        if len(sample) >= DETECTION_ROWS:
            break
    if sample:
        return detect(sample[:DETECTION_ROWS], name, speakers)
    if faults:
        shown = "; ".join(f"line {number}: {fault}" for number, fault in faults[:SHOWN_FAULTS])
        raise UsageError(f"{name}: none of its first {len(faults):,} rows can be read: {shown}")
    return Format.CHAT


class _CsvParser:
    """Parses CSV records under the names in the header; every value is text."""

    def __init__(self, header: bytes) -> None:
        text = header.decode("utf-8", "replace").strip("\r\n")
        self._delimiter = delimiter_of(header).decode()
        try:
            rows = self._rows(text)
        except csv.Error as error:
            raise UsageError(f"the CSV header cannot be read: {error}; quote names that hold quotes") from None
        # The kept rows start with the same header, and other readers would find rows in it.
        if len(rows) > 1:
            raise UsageError("a carriage return in the CSV header joins it to a row; end each line with a line feed")
        self._names = rows[0] if rows else []
        if len(set(self._names)) != len(self._names):
            raise UsageError(f"the CSV header names a column twice: {printable(self._names)}")

    def __call__(self, raw: bytes) -> Row | Fault:
        try:
            rows = self._rows(raw.decode("utf-8").rstrip("\r\n"))
        except UnicodeDecodeError as bad:
            return utf8_fault(raw, bad.start)
        except csv.Error as error:
            return Fault("", "invalid_csv", str(error), "quote fields that hold quotes or line breaks")
        # The file was cut where quotes are balanced; a reader that ignores quotes would find other rows here.
        if len(rows) != 1:
            message = f"a stray quote or carriage return joins {len(rows)} rows"
            return Fault("", "invalid_csv", message, "quote fields that hold quotes or line breaks")
        (cells,) = rows
        if len(cells) != len(self._names):
            message = f"{len(cells)} fields, and the header has {len(self._names)}"
            return Fault("", "invalid_csv", message, "quote fields that hold the separator")
        return dict(zip(self._names, cells, strict=True))

    def _rows(self, text: str) -> list[list[str]]:
        return list(csv.reader(io.StringIO(text, newline=""), delimiter=self._delimiter, strict=True))


def _native_rows(table: pa.Table) -> list[Row | Fault]:
    """Every row of a table, or its fault where a cell has no value in Python.

    Times are left out: no format has text there, and some cannot be converted.
    """
    columns = {
        field.name: _cells(table[field.name], field.name)
        for field in table.schema
        if not pa.types.is_temporal(field.type)
    }
    return [_row({name: cells[index] for name, cells in columns.items()}) for index in range(table.num_rows)]


def _row(cells: Row) -> Row | Fault:
    fault = next((cell for cell in cells.values() if isinstance(cell, Fault)), None)
    return {name: _without_nulls(cell) for name, cell in cells.items() if cell is not None} if fault is None else fault


def _cells(column: pa.ChunkedArray, name: str) -> list[object]:
    try:
        return column.to_pylist()
    except _UNREADABLE:
        return [_cell(value, name) for value in column]


def _cell(value: pa.Scalar, name: str) -> object:
    try:
        return value.as_py()
    except UnicodeDecodeError as bad:
        return Fault(name, "invalid_utf8", f"byte {bad.start} is not UTF-8", "save the column as UTF-8")
    except _UNREADABLE as error:
        return Fault(name, "data_type", f"the value cannot be read ({type(error).__name__})", "drop or cast the column")


def _without_nulls(value: object) -> object:
    """Struct columns hold null for keys that a row does not have: absent keys."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


csv.field_size_limit(1 << 30)
