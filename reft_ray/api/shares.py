"""Fair shares of something scarce: no owner holds more than its share, and who holds least is served first."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

OWNER: ContextVar[str | None] = ContextVar("owner", default=None)
"""The project whose request is at work, which `admission` sets."""

NEW_SECONDS, LONGEST_ASIDE, POLL_SECONDS = 0.05, 0.02, 0.001
_new: set[Call] = set()


@dataclass(eq=False, slots=True)
class Call:
    """A call that has just begun; its owner is None until it is known."""

    owner: str | None = None
    begun: float = field(default_factory=time.monotonic)


@contextmanager
def call_at_work() -> Iterator[Call]:
    """Rows of other owners' datasets wait for the block, unless it takes long: then it mostly waits itself."""
    call = Call()
    _new.add(call)
    try:
        yield call
    finally:
        _new.discard(call)


async def step_aside(turns: Shares) -> None:
    """Between two pieces of a dataset's rows: first the new calls of other owners, then the rows of other owners."""
    owner = OWNER.get()
    async with turns.held(owner):
        until = time.monotonic() + LONGEST_ASIDE
        await asyncio.sleep(0)
        while (now := time.monotonic()) < until:
            _new.difference_update([call for call in list(_new) if call.begun < now - NEW_SECONDS])
            if all(call.owner == owner for call in list(_new)):
                return
            await asyncio.sleep(POLL_SECONDS)


class LeastSpent:
    """Chooses, of the owners that wait, the one that has spent the least; `spend` counts in any unit."""

    def __init__(self) -> None:
        self._spent: dict[str | None, float] = {}

    def choose(self, waiting: Collection[str | None]) -> str | None:
        """The next owner, the first of equals; the same one until it has spent something."""
        # Who comes back starts with those who are here: what was not used is not saved up.
        least = min((self._spent[owner] for owner in waiting if owner in self._spent), default=0.0)
        for owner in waiting:
            self._spent[owner] = max(self._spent.get(owner, least), least)
        return min(waiting, key=self._spent.__getitem__)

    def spend(self, owner: str | None, amount: float) -> None:
        """Count what an owner was given."""
        self._spent[owner] = self._spent.get(owner, 0.0) + amount


class Shares:
    """`size` slots, of which one owner holds up to `per_owner`; for one event loop. None is the only owner: it has all.

    `take` does not wait. `held` waits: a free slot goes to the waiting owner that holds the fewest, among those to the
    one that was served longest ago, and among its calls to the one that has waited longest.
    """

    def __init__(self, size: int, per_owner: int | None = None) -> None:
        self.size = size
        self.per_owner = size if per_owner is None else min(size, per_owner)
        self._held: Counter[str | None] = Counter()
        self._turns = 0
        self._served: dict[str | None, int] = {}
        self._waiting: deque[tuple[str | None, asyncio.Future[None]]] = deque()

    def take(self, owner: str | None) -> bool:
        """Take a slot; False when none is free, or when the owner has its share."""
        if self._held.total() >= self.size or not self._may(owner):
            return False
        self._held[owner] += 1
        return True

    def give(self, owner: str | None) -> None:
        """Free a slot of the owner."""
        self._held[owner] -= 1
        if not self._held[owner]:
            del self._held[owner]
        self._serve()

    @asynccontextmanager
    async def held(self, owner: str | None) -> AsyncIterator[None]:
        """Hold a slot during the block, after waiting for it."""
        await self.wait(owner)
        try:
            yield
        finally:
            self.give(owner)

    async def wait(self, owner: str | None) -> None:
        """Take a slot, after waiting for it; pair with `give`."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((owner, turn))
        self._serve()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give(owner)
            raise

    def _may(self, owner: str | None) -> bool:
        return self._held[owner] < (self.size if owner is None else self.per_owner)

    def _serve(self) -> None:
        while self._held.total() < self.size:
            self._waiting = deque(entry for entry in self._waiting if not entry[1].done())
            able = [entry for entry in self._waiting if self._may(entry[0])]
            if not able:
                return
            # Those who do not wait count as new, so that the record stays short.
            self._served = {owner: self._served.get(owner, 0) for owner, _ in self._waiting}
            owner, turn = min(able, key=lambda entry: (self._held[entry[0]], self._served[entry[0]]))
            self._turns += 1
            self._served[owner] = self._turns
            self._held[owner] += 1
            turn.set_result(None)
