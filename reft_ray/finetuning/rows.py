"""Rows of a run in an order that depends on the seed alone: not on the number of ranks, nor on a restart.

Every rank walks the same stream of global batches and takes its share of each; the data position of the whole run
is one number. The price is that every rank reads the text of all rows, which is small beside training on them.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Protocol, TypeVar

from reft_ray.core.batch import TokenizedExample
from reft_ray.core.conversation import Example

T = TypeVar("T")


class RowSource(Protocol):
    """User rows, each epoch from the first to the last in the same order."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Example]: ...


def messages_json(row: Example) -> str:
    """A row's chat messages as JSON."""
    return json.dumps(
        [{"role": turn.role, "content": turn.content, "weight": int(turn.trained)} for turn in row.messages]
    )


def digest_of(rows: Iterable[Example]) -> str:
    """24 hex digits of SHA-256 over the messages and labels of rows, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{row.label} {messages_json(row)}\n".encode())
    return digest.hexdigest()[:24]


def shuffled(rows: Iterable[T], buffer: int, seed: str) -> Iterator[T]:
    """A streaming shuffle through a buffer: memory is bounded by it, the order is a function of the seed."""
    rng = random.Random(seed)  # noqa: S311 - an order, not a secret
    held: list[T] = []
    for row in rows:
        if len(held) < buffer:
            held.append(row)
            continue
        at = rng.randrange(buffer)
        out, held[at] = held[at], row
        yield out
    rng.shuffle(held)
    yield from held


def global_batches(rows: Iterable[T], size: int, skip: int = 0) -> Iterator[list[T]]:
    """Rows in lists of `size`, after the first `skip` of them."""
    stream = iter(rows)
    next(islice(stream, skip, skip), None)
    while batch := list(islice(stream, size)):
        yield batch


def share(rows: Sequence[T], rank: int, world_size: int) -> list[T]:
    """One rank's rows of a global batch."""
    return list(rows[rank::world_size])


class CyclingSampler:
    """Rows again and again, newly shuffled on each pass.

    A checkpoint keeps two numbers: `position`, and `ahead`, the tokens taken so far beyond those asked for.
    """

    def __init__(self, rows: Sequence[TokenizedExample], seed: str, position: int = 0, ahead: float = 0.0) -> None:
        if not rows:
            raise ValueError("cannot cycle over no rows")
        self.rows = rows
        self.seed = seed
        self.position = position
        self.ahead = ahead
        self._order: list[int] = []
        self._pass = -1

    def take_rows(self, count: int) -> list[TokenizedExample]:
        """The next `count` rows."""
        return [self._next() for _ in range(count)]

    def take_tokens(self, tokens: float) -> list[TokenizedExample]:
        """The next rows, at least one, until they hold `tokens` tokens, prompts included: the unit of cost.

        What a call takes too much the next one takes less; otherwise small budgets would be overdrawn every time.
        """
        taken = [self._next()]
        self.ahead += len(taken[0]) - tokens
        while self.ahead < 0:
            taken.append(self._next())
            self.ahead += len(taken[-1])
        return taken

    def _next(self) -> TokenizedExample:
        number, at = divmod(self.position, len(self.rows))
        if number != self._pass:
            self._order = list(range(len(self.rows)))
            random.Random(f"{self.seed}/{number}").shuffle(self._order)  # noqa: S311
            self._pass = number
        self.position += 1
        return self.rows[self._order[at]]
