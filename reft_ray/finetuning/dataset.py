"""A run's rows in Ray Data: tokenised by its tasks, once for all ranks, so that no step waits for a tokenizer.

A dataset that comes in has two columns: `row_number` int64 and `messages`, the chat messages as JSON.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data
from ray.data import TaskPoolStrategy

from reft_ray.core.conversation import Example
from reft_ray.core.errors import ReftError
from reft_ray.finetuning.config import FinetuneConfig
from reft_ray.finetuning.encoding import Sequences, TokenisedRow, answers_of, pairs_of
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.loading import context_of, load_tokenizer
from reft_ray.rows.text import messages_json, read_messages

COLUMNS = pa.schema([("row_number", pa.int64()), ("messages", pa.string())])
_SEQUENCE = pa.struct([("ids", pa.list_(pa.int32())), ("learned", pa.list_(pa.bool_())), ("prompt_end", pa.int32())])
TOKENISED = pa.schema([("row_number", pa.int64()), ("sequences", pa.list_(_SEQUENCE)), ("error", pa.string())])
_BATCH_ROWS = 256
_READ_ROWS = 1024
_TASKS = 4


def dataset_of(rows: Iterable[Example]) -> ray.data.Dataset:
    """A small set of examples as a dataset, numbered from 0."""
    messages = [messages_json(row.messages) for row in rows]
    numbers = pa.array(range(len(messages)), pa.int64())
    return ray.data.from_arrow(pa.table({"row_number": numbers, "messages": messages}, COLUMNS))


def tokenised(rows: ray.data.Dataset, config: FinetuneConfig) -> ray.data.Dataset:
    """The rows as TOKENISED, in order; for several epochs in the object store, for one while they are read."""
    longest = config.longest_row(context_of(config.base))
    base, thinking, pairs = config.base, config.enable_thinking, config.loss == "dpo"

    def tokens(batch: pa.Table) -> pa.Table:
        return tokens_of(batch, _sequences(base, thinking, pairs, longest))

    rows.context.execution_options.preserve_order = True
    # No CPU slot: a trainer may hold all of them while it waits for these rows.
    found = rows.map_batches(
        tokens, batch_size=_BATCH_ROWS, batch_format="pyarrow", num_cpus=0, compute=TaskPoolStrategy(_TASKS)
    )
    return found.materialize() if config.epochs > 1 else found


@cache
def _sequences(base: str, thinking: bool, pairs: bool, longest: int) -> Sequences:
    return (pairs_of if pairs else answers_of)(ChatFormat(load_tokenizer(base), thinking), longest)


def tokens_of(batch: pa.Table, sequences: Sequences) -> pa.Table:
    """Rows of COLUMNS as TOKENISED."""
    return pa.Table.from_pylist([_tokens(row, sequences) for row in batch.to_pylist()], schema=TOKENISED)


def _tokens(row: dict[str, Any], sequences: Sequences) -> dict[str, Any]:
    try:
        found = sequences(Example(read_messages(row["messages"])))
    except ReftError as error:
        return {"row_number": row["row_number"], "error": str(error)}
    parts = [{"ids": one.ids, "learned": one.loss_mask, "prompt_end": one.last_prompt_index} for one in found]
    return {"row_number": row["row_number"], "sequences": parts}


class ShardRows:
    """A RowSource over an iterator of TOKENISED; only the read-ahead is in memory."""

    def __init__(self, shard: ray.data.DataIterator, count: int) -> None:
        self._shard = shard
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[TokenisedRow]:
        for batch in self._shard.iter_batches(batch_size=_READ_ROWS, batch_format="pyarrow"):
            table: Any = batch
            for number, sequences, error in zip(*(table[name] for name in TOKENISED.names), strict=True):
                arrays = [_arrays(one) for one in sequences.values or ()]
                yield TokenisedRow(f"row {number}", arrays, error.as_py())


def _arrays(sequence: pa.StructScalar) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_], int]:
    ids, learned = sequence["ids"].values, sequence["learned"].values
    return ids.to_numpy(), learned.to_numpy(zero_copy_only=False), sequence["prompt_end"].as_py()
