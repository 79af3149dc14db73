"""The order of a run's rows: shuffled, in global batches, split over ranks.

The order depends on the seed alone, not on the number of ranks or restarts. Every rank reads the same stream of global
batches and takes its slice of each, so that the data position of the whole run is one number. Every rank therefore
reads all rows, or their tokens (`finetuning.dataset`), which costs little compared with training on them.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, TypeVar

from reft_ray.core.batch import TokenizedExample
from reft_ray.core.conversation import Example
from reft_ray.finetuning.encoding import Row
from reft_ray.rows.text import messages_json

T = TypeVar("T")

LEAST_ALIGNMENT = 256
"""A run is given at least this many alignment rows, or all."""


class RowSource(Protocol):
    """User rows, each epoch from the first to the last in the same order."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Row]: ...


def digest_of(rows: Iterable[Example]) -> str:
    """24 hex digits of SHA-256 over the messages and labels of rows, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{row.label} {messages_json(row.messages)}\n".encode())
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


def rank_slice(rows: Sequence[T], rank: int, world_size: int) -> list[T]:
    """One rank's rows of a global batch."""
    return list(rows[rank::world_size])


@dataclass(slots=True)
class SamplerState:
    """What a checkpoint keeps of a sampler: the next row, and the tokens taken so far beyond those requested."""

    position: int = 0
    surplus: float = 0.0


class CyclingSampler:
    """Rows again and again, newly shuffled on each pass. Sampling updates `state`."""

    def __init__(self, rows: Sequence[TokenizedExample], seed: str, state: SamplerState | None = None) -> None:
        if not rows:
            raise ValueError("cannot cycle over no rows")
        self.rows = rows
        self.seed = seed
        self.state = state or SamplerState()
        self._order: list[int] = []
        self._pass = -1

    def take_rows(self, count: int) -> list[TokenizedExample]:
        """The next `count` rows."""
        return [self._next() for _ in range(count)]

    def take_tokens(self, tokens: float) -> list[TokenizedExample]:
        """The next rows, at least one, until they have `tokens` tokens, prompts included: the unit of cost.

        A call's surplus is taken off the next one; otherwise small budgets would be exceeded every time.
        """
        taken = [self._next()]
        self.state.surplus += len(taken[0]) - tokens
        while self.state.surplus < 0:
            taken.append(self._next())
            self.state.surplus += len(taken[-1])
        return taken

    def _next(self) -> TokenizedExample:
        number, at = divmod(self.state.position, len(self.rows))
        if number != self._pass:
            self._order = list(range(len(self.rows)))
            random.Random(f"{self.seed}/{number}").shuffle(self._order)  # noqa: S311
            self._pass = number
        self.state.position += 1
        return self.rows[self._order[at]]


def enough_alignment(rows: Sequence[T], draws: float) -> Sequence[T]:
    """A fixed random sample of the alignment rows, in their order, for a run that draws about `draws` of them.

    The teacher labels all rows that a run is given, which for a small run would take longer than its training. Sizes
    are powers of two, so that runs of about one length share their labels.
    """
    size = max(LEAST_ALIGNMENT, 1 << math.ceil(math.log2(max(1, draws))))
    if size >= len(rows):
        return rows
    return [rows[n] for n in sorted(random.Random("alignment").sample(range(len(rows)), size))]  # noqa: S311
