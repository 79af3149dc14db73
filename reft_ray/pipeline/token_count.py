"""Count a training file's tokens with the base model's tokenizer, for cost estimates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cache

from reft_ray.hf.row_check import TemplateCheck
from reft_ray.jobs.content import split_lines
from reft_ray.jobs.estimate import Size, count_bytes
from reft_ray.rows.checks import Fault
from reft_ray.rows.reader import ChatRow, RowReader

EXACT_ROWS, EXACT_BYTES = 2_000, 8 << 20
"""Tokenise at most this many rows and bytes, plus one row; the rest is extrapolated by bytes."""


class TokenizerCounter:
    """A `jobs.estimate.Counter` for JSONL files; `bases` maps models to directories or hub ids."""

    def __init__(self, bases: Mapping[str, str], exact_rows: int = EXACT_ROWS) -> None:
        self._bases = dict(bases)
        self._exact_rows = exact_rows
        self._check = cache(TemplateCheck)

    def __call__(self, model: str, chunks: Iterable[bytes]) -> Size:
        """Invalid rows count as 0 tokens; other file formats are estimated from their bytes."""
        check, reader = self._check(self._bases[model]), RowReader()
        rows = size = tokens = counted = 0
        exact = True
        for line in split_lines(chunks):
            if not line or line.isspace():
                continue
            rows += 1
            size += len(line)
            if exact := exact and rows <= self._exact_rows and counted < EXACT_BYTES:
                counted += len(line)
                tokens += _tokens(check, reader.read_line(line))
        if tokens == 0:
            return Size(rows, count_bytes(model, [b"x" * size]).tokens, exact=False)
        return Size(rows, tokens if exact else math.ceil(tokens * size / counted), exact)


def _tokens(check: TemplateCheck, row: ChatRow | list[Fault]) -> int:
    found = row if isinstance(row, list) else check.tokens(row.conversation)
    return found if isinstance(found, int) else 0
