"""Token buckets in SQL: a project's limits hold over all gateways."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Float, Select, bindparam, case, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.sql.dml import ReturningUpdate

from reft_ray.jobs.database import Database
from reft_ray.jobs.tables import rate_buckets

MINUTE = 60.0
AHEAD_SECONDS = 5.0

LOCK_SECONDS = 5.0
"""How long a request waits for a locked database before its limit is taken as unknown."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """A bucket after a request; `wait` is 0 when the request is allowed, else the seconds until it would be."""

    limit: int
    remaining: int
    reset_seconds: float
    wait: float

    @property
    def allowed(self) -> bool:
        """Whether the request may proceed."""
        return self.wait <= 0


def _statements() -> tuple[ReturningUpdate[Any], Select[Any]]:
    """Take `cost` from a full enough bucket, and read its level: made once, since each request would take longer to
    write them than the database to run them."""
    now, ahead, rate, most, cost = (bindparam(name, type_=Float) for name in ("now", "ahead", "rate", "most", "cost"))
    level, updated_at = rate_buckets.c.level, rate_buckets.c.updated_at
    mine = (rate_buckets.c.owner == bindparam("of")) & (rate_buckets.c.name == bindparam("kind"))
    # Gateways' clocks differ by seconds, and then the later one counts. A bucket further ahead was filled by a clock
    # that was set back since.
    elapsed = case((updated_at < now, now - updated_at), else_=0)
    latest = case(((updated_at > ahead) | (updated_at < now), now), else_=updated_at)
    filled = level + elapsed * rate
    current = case((filled > most, most), else_=filled)
    taking = update(rate_buckets).where(mine, current >= cost).values(level=current - cost, updated_at=latest)
    return taking.returning(level), select(current).where(mine)


_TAKE, _LEVEL = _statements()


class RateLimits:
    """Buckets that hold one minute's tokens and refill evenly."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def take(self, owner: str, name: str, cost: float, per_minute: int) -> Allowance:
        """Take `cost` if the bucket holds it, in one conditional UPDATE, so two gateways cannot both take it."""
        if cost > per_minute:
            return Allowance(per_minute, 0, MINUTE, math.inf)
        now, rate = self.database.now(), per_minute / MINUTE
        values = {"of": owner, "kind": name, "now": now, "ahead": now + AHEAD_SECONDS, "rate": rate, "most": per_minute}
        with self.database.write(LOCK_SECONDS) as connection:
            left = connection.execute(_TAKE, {**values, "cost": cost}).scalar()
            taken = left is not None
            if not taken:
                left = connection.execute(_LEVEL, values).scalar()
        if left is None:
            self._fill(owner, name, per_minute)
        if left is None or (not taken and left >= cost):
            # The bucket was created, or refilled, between the two statements.
            return self.take(owner, name, cost, per_minute)
        wait = 0.0 if taken else (cost - left) / rate
        return Allowance(per_minute, max(0, int(left)), (per_minute - left) / rate, wait)

    def settle(self, owner: str, name: str, difference: float) -> None:
        """Correct an estimated cost; a negative difference takes more, also below zero."""
        with self.database.write() as connection:
            connection.execute(
                update(rate_buckets)
                .where(rate_buckets.c.owner == owner, rate_buckets.c.name == name)
                .values(level=rate_buckets.c.level + difference)
            )

    def _fill(self, owner: str, name: str, per_minute: int) -> None:
        try:
            with self.database.write() as connection:
                connection.execute(
                    insert(rate_buckets).values(
                        owner=owner, name=name, level=per_minute, updated_at=self.database.now()
                    )
                )
        except IntegrityError:
            return  # another gateway created it first
