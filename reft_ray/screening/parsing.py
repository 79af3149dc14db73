"""From the bytes or columns of a unit to rows as dictionaries, per file format."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass

import orjson

from reft_ray.core.errors import UsageError
from reft_ray.screening.checks import Fault
from reft_ray.screening.formats import Format, Row, columns, detect, mapped
from reft_ray.screening.native import native_rows
from reft_ray.screening.reading import FilePlan, Unit, read_units
from reft_ray.screening.sources import Container
from reft_ray.screening.validation import DETECTION_ROWS, REPEATED_KEY, parse_row, repeats_key

_STRUCTURED = frozenset(
    {"messages", "conversations", "history", "tools", "chosen", "rejected", "preferred_output", "non_preferred_output"}
)


@dataclass(frozen=True, slots=True)
class FileShape:
    """What it takes to understand the units of one file; no credentials, so it may travel and be stored."""

    index: int
    name: str
    container: Container
    compression: str | None
    first_row: int
    format: Format
    header: bytes = b""


def parse_unit(unit: Unit, container: Container, header: bytes = b"") -> list[Row | Fault]:
    """Every row of a unit as a dictionary, or the fault that keeps it from being one, in order.

    Raises UsageError when the header of a CSV file does not name its columns.
    """
    if unit.native is not None:
        return native_rows(unit.native)
    raws = unit.rows["raw"].to_pylist()
    reasons = unit.rows["reason"].to_pylist()
    parse = _CsvParser(header) if container is Container.CSV else parse_row
    return [
        parse(raw) if reason is None else Fault("", *reason.split(": ", 1))
        for raw, reason in zip(raws, reasons, strict=True)
    ]


def shape_of(plan: FilePlan, fmt: Format | None, columns: Mapping[str, str]) -> FileShape:
    """The shape of a file, its format detected from its first rows unless it is named.

    Raises UsageError when the format is ambiguous or unknown, or a CSV header wrong. A file without any row has no
    wrong format.
    """
    source, header = plan.source, plan.cuts.header
    if source.container is Container.CSV:
        try:
            _CsvParser(header)
        except UsageError as error:
            raise UsageError(f"{source.name}: {error}") from None
    found = fmt or _detected(plan, columns)
    return FileShape(plan.index, source.name, source.container, source.compression, plan.first_row, found, header)


def _detected(plan: FilePlan, columns: Mapping[str, str]) -> Format:
    sample: list[Row] = []
    seen = 0
    for unit in read_units(plan, plan.cuts.ranges[:3]):
        rows = parse_unit(unit, plan.source.container, plan.cuts.header)
        seen += len(rows)
        sample += [mapped(row, columns) for row in rows if not isinstance(row, Fault)]
        if len(sample) >= DETECTION_ROWS:
            break
    return detect(sample[:DETECTION_ROWS], plan.source.name) if seen else Format.CHAT


class _CsvParser:
    """Parses CSV records under the names in the header; every value is text."""

    def __init__(self, header: bytes) -> None:
        text = header.decode("utf-8", "replace").strip("\r\n")
        self._delimiter = max(",\t;", key=text.count)
        try:
            rows = self._rows(text)
        except csv.Error as error:
            raise UsageError(f"the CSV header cannot be read: {error}; quote names that hold quotes") from None
        # It is handed on with the kept rows as it stands, and other readers would find rows in it.
        if len(rows) > 1:
            raise UsageError("a carriage return in the CSV header joins it to a row; end each line with a line feed")
        self._names = rows[0] if rows else []
        if len(set(self._names)) != len(self._names):
            raise UsageError(f"the CSV header names a column twice: {columns(self._names)}")

    def __call__(self, raw: bytes) -> Row | Fault:
        try:
            rows = self._rows(raw.decode("utf-8").rstrip("\r\n"))
        except UnicodeDecodeError as bad:
            return Fault("", "invalid_utf8", f"byte {bad.start} is not UTF-8", "save the file as UTF-8")
        except csv.Error as error:
            return Fault("", "invalid_csv", str(error), "quote fields that hold quotes or line breaks")
        # The file was cut where quotes pair up, and a reader that does not pair them would find other rows here.
        if len(rows) != 1:
            message = f"a stray quote or carriage return joins {len(rows)} rows"
            return Fault("", "invalid_csv", message, "quote fields that hold quotes or line breaks")
        (cells,) = rows
        if len(cells) != len(self._names):
            message = f"{len(cells)} fields, and the header has {len(self._names)}"
            return Fault("", "invalid_csv", message, "quote fields that hold the separator")
        row = {name: _structured(name, cell) for name, cell in zip(self._names, cells, strict=True)}
        return REPEATED_KEY if None in row.values() else row

    def _rows(self, text: str) -> list[list[str]]:
        return list(csv.reader(io.StringIO(text, newline=""), delimiter=self._delimiter, strict=True))


def _structured(name: str, cell: str) -> object:
    """A list that a cell holds as JSON, in the columns that are lists in every other container; None where it has a
    key twice."""
    if name in _STRUCTURED and cell[:1] in ("[", "{"):
        try:
            value = orjson.loads(cell)
        except orjson.JSONDecodeError:
            return cell
        return None if repeats_key(cell.encode(), value) else value
    return cell


csv.field_size_limit(1 << 30)
