"""Fair shares of something scarce: no owner holds more than its share, and who holds least is served first."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Shares:
    """`size` slots, of which one owner holds up to `per_owner`; for one event loop. None is the only owner: it has all.

    `take` does not wait. `held` waits: a free slot goes to the waiting owner that holds the fewest, and among those to
    the one that has waited longest.
    """

    def __init__(self, size: int, per_owner: int | None = None) -> None:
        self.size = size
        self.per_owner = size if per_owner is None else min(size, per_owner)
        self._held: Counter[str | None] = Counter()
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
            owner, turn = min(able, key=lambda entry: self._held[entry[0]])
            self._held[owner] += 1
            turn.set_result(None)
