"""From columns to rows: cells of Parquet and Arrow files as Python values, or the fault of the row they stand in."""

from __future__ import annotations

import pyarrow as pa

from reft_ray.screening.checks import Fault
from reft_ray.screening.formats import Row

_UNREADABLE = (ValueError, ArithmeticError, LookupError, pa.ArrowException)
"""What Arrow and Python raise on values that one of them cannot hold."""


def native_rows(table: pa.Table) -> list[Row | Fault]:
    """Every row of a table, or its fault where a cell is no value that Python can hold.

    Times are left out: no format has text there, and not every one can be converted.
    """
    columns = {
        field.name: _cells(table[field.name], field.name)
        for field in table.schema
        if not pa.types.is_temporal(field.type)
    }
    return [_row({name: cells[index] for name, cells in columns.items()}) for index in range(table.num_rows)]


def _row(cells: Row) -> Row | Fault:
    fault = next((cell for cell in cells.values() if isinstance(cell, Fault)), None)
    return {name: _dropped(cell) for name, cell in cells.items() if cell is not None} if fault is None else fault


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


def _dropped(value: object) -> object:
    """Columns of structures hold null for keys that a row does not have; take them for absent."""
    if isinstance(value, dict):
        return {key: _dropped(item) for key, item in value.items() if item is not None}
    return [_dropped(item) for item in value] if isinstance(value, list | tuple) else value
