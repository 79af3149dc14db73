"""Rows that Ray Data's tasks tokenise: the same sequences and errors as in the run itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from reft_ray.core.conversation import Example, Message, chat
from reft_ray.finetuning.dataset import COLUMNS, ShardRows, tokens_of
from reft_ray.finetuning.encoding import Sequences, SkippedRows, answers_of, encode, pairs_of
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.loading import load_tokenizer
from reft_ray.rows.text import messages_json, with_rejected

ROWS = [
    Example(chat("how can i", "sure here is")),
    Example((*chat("hi", "yes"), Message("user", "and"), Message("assistant", "no"))),
    Example(chat("please " * 100, "sure")),
    Example(with_rejected(chat("hi", "yes"), chat("hi", "no"))),
]


class Shard:
    """What a worker gets from Ray: batches of a table."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def iter_batches(self, batch_size: int, batch_format: str) -> Iterator[pa.Table]:
        assert batch_format == "pyarrow"
        for start in range(0, len(self.table), 3):
            yield self.table[start : start + 3]


@pytest.mark.parametrize("make", [answers_of, pairs_of])
def test_a_run_reads_what_it_would_have_tokenised_itself(llama: Path, make) -> None:
    sequences: Sequences = make(ChatFormat(load_tokenizer(str(llama))), 32)
    texts = [messages_json(row.messages) for row in ROWS]
    table = pa.table({"row_number": list(range(1, 5)), "messages": texts}, schema=COLUMNS)
    stored = ShardRows(Shard(tokens_of(table, sequences)), len(ROWS))  # type: ignore[arg-type]
    named = [Example(row.messages, place=f"row {n}") for n, row in enumerate(ROWS, 1)]
    here, there = SkippedRows(), SkippedRows()
    assert encode(sequences, list(stored), there) == encode(sequences, named, here)
    assert there == here
    assert here.count > 0
