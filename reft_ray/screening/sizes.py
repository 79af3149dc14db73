"""How many bytes rows of columns take once they are values: what a file stores once may stand in every row."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_CELL = 8
"""Bytes of a cell beside its text: a pointer, or a number."""


def row_sizes(batch: pa.RecordBatch) -> np.ndarray:
    """Bytes of each row of a batch, at least; dictionaries are counted where they are referred to."""
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
    """Whether the bytes of values of a type can be told before they are taken apart."""
    if isinstance(kind, pa.BaseExtensionType):
        return not is_text(kind.storage_type) and not pa.types.is_nested(kind.storage_type)
    types = pa.types
    views = types.is_string_view(kind) or types.is_binary_view(kind)
    views = views or types.is_list_view(kind) or types.is_large_list_view(kind)
    return not (views or types.is_union(kind) or types.is_run_end_encoded(kind))
