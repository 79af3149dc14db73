"""User rows between Ray Data and a training loop.

A row travels as two columns: `row_number` int64 and `messages`, the chat messages as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import ray.data

from reft_ray.core.conversation import Example
from reft_ray.rows.text import conversation_from
from reft_ray.core.errors import ReftError
from reft_ray.finetuning.rows import messages_json

COLUMNS = pa.schema([("row_number", pa.int64()), ("messages", pa.string())])
_READ_ROWS = 1024


def table_of(rows: Iterable[Example]) -> pa.Table:
    """Examples as a table of the two columns, numbered from 0."""
    messages = [messages_json(row) for row in rows]
    return pa.table({"row_number": pa.array(range(len(messages)), pa.int64()), "messages": messages}, COLUMNS)


def dataset_of(rows: Iterable[Example]) -> ray.data.Dataset:
    """A small set of examples as a dataset."""
    return ray.data.from_arrow(table_of(rows))


class ShardRows:
    """`finetuning.rows.RowSource` over a Ray Data iterator; only the read-ahead is in memory."""

    def __init__(self, shard: ray.data.DataIterator, count: int) -> None:
        self._shard = shard
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Example]:
        for batch in self._shard.iter_batches(batch_size=_READ_ROWS, batch_format="pyarrow"):
            assert isinstance(batch, pa.Table)
            for row in batch.to_pylist():
                yield example_of(row["messages"], f"row {row['row_number']}")


def example_of(messages: str, place: str = "") -> Example:
    """One row's JSON as an Example; `place` names it in messages."""
    parsed: Any = json.loads(messages)
    if not isinstance(parsed, list):
        raise ReftError("a kept row must hold a list of messages")
    return Example(conversation_from(parsed), place=place)
