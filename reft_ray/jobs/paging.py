"""Cursor pagination over tables with a `seq` column: files, jobs, events and checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sqlalchemy import Connection, Select, Table, select

from reft_ray.jobs.errors import InvalidError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """One page of a list."""

    items: tuple[T, ...]
    has_more: bool


def page(
    connection: Connection,
    table: Table,
    query: Select[Any],
    build: Callable[[Any], T],
    *,
    after: str | None,
    limit: int,
    ascending: bool = False,
) -> Page[T]:
    """Up to `limit` items that follow the one with id `after`, newest first unless `ascending`.

    Raises InvalidError for a cursor that the query does not contain: starting again would make a client loop forever.
    """
    seq = table.c.seq
    if after is not None:
        start = connection.execute(select(seq).where(table.c.id == after)).scalar()
        known = start is not None and connection.execute(query.where(seq == start)).first() is not None
        if not known:
            raise InvalidError(f"after: there is no item {after!r} in this list", "after")
        query = query.where(seq > start if ascending else seq < start)
    rows = connection.execute(query.order_by(seq if ascending else seq.desc()).limit(limit + 1)).all()
    return Page(tuple(build(row) for row in rows[:limit]), len(rows) > limit)
