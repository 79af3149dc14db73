"""Batch calls to a teacher by cost, interactive calls first, then in turns of their owners.

Calls that arrive during a batch form the next one.

`serve.batch` is not used: it forms batches on a timer while earlier ones still run (small batches, which then wait),
rejects an item larger than a batch, and has neither deadlines nor priorities.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Generic, TypeVar

from reft_ray.api.shares import LeastSpent

Item = TypeVar("Item")
Result = TypeVar("Result")
Other = TypeVar("Other")

_MAX_PASSED_OVER = 8
"""Consecutive batches without a bulk call while some wait."""


class ExpiredError(Exception):
    """The call's deadline passed before its turn came."""


@dataclass(slots=True)
class _Call(Generic[Item, Result]):
    item: Item
    cost: int
    deadline: float
    owner: str | None
    answer: asyncio.Future[Result]
    arrived: float = field(default_factory=time.monotonic)


class _Line(Generic[Item, Result]):
    """Calls that wait: the next is the oldest of the owner whose calls have cost the least so far."""

    def __init__(self) -> None:
        self._calls: dict[str | None, deque[_Call[Item, Result]]] = {}
        self._turns = LeastSpent()

    def __len__(self) -> int:
        return sum(len(calls) for calls in self._calls.values())

    def __iter__(self) -> Iterator[_Call[Item, Result]]:
        return chain.from_iterable(self._calls.values())

    def append(self, call: _Call[Item, Result]) -> None:
        self._calls.setdefault(call.owner, deque()).append(call)

    def next(self) -> _Call[Item, Result]:
        return self._calls[self._turns.choose(self._calls)][0]

    def remove(self, call: _Call[Item, Result], ran: bool) -> None:
        """Remove the next call; its owner pays for one that runs."""
        calls = self._calls[call.owner]
        calls.popleft()
        if not calls:
            del self._calls[call.owner]
        if ran:
            self._turns.spend(call.owner, call.cost)


class Batcher(Generic[Item, Result]):
    """Runs `run` on lists of items in a dedicated thread, one list at a time.

    Always the same thread: OpenMP makes a team per computing thread, and with two teams it disables spinning at
    barriers, which costs a scorer on two cores a quarter of its speed.

    A batch holds calls up to `budget` in cost, at least one. `observe` receives the seconds that a call waited. When
    `run` raises, the batch's items run one by one, so that one bad call does not fail the others.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], list[Result]],
        budget: int,
        observe: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.budget = budget
        self._run = run
        self._observe = observe
        self._urgent: _Line[Item, Result] = _Line()
        self._bulk: _Line[Item, Result] = _Line()
        self._passed_over = 0
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._worker: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Number of queued calls."""
        return len(self._urgent) + len(self._bulk)

    @property
    def items(self) -> list[Item]:
        """The queued items."""
        return [call.item for queue in (self._urgent, self._bulk) for call in queue]

    async def submit(self, item: Item, cost: int, deadline: float, urgent: bool, owner: str | None = None) -> Result:
        """The result for an item. `deadline` is in `time.monotonic()` seconds, `owner` the project that asks.

        Cancelling the call removes it from the queue. Raises ExpiredError, or what `run` raised for this item.
        """
        answer: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        (self._urgent if urgent else self._bulk).append(_Call(item, cost, deadline, owner, answer))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await answer

    async def alone(self, action: Callable[[], Other]) -> Other:
        """Run an action between two batches, in their thread."""
        async with self._turn:
            return await self._in_thread(action)

    async def _work(self) -> None:
        while self.waiting:
            async with self._turn:
                calls = self._take()
                if calls:
                    await self._answer(calls)

    def _take(self) -> list[_Call[Item, Result]]:
        """The next batch: urgent calls first, unless bulk calls have been passed over too often."""
        starved = self._passed_over >= _MAX_PASSED_OVER
        queues = (self._bulk, self._urgent) if starved else (self._urgent, self._bulk)
        calls: list[_Call[Item, Result]] = []
        left = self.budget
        bulk_before = len(self._bulk)
        for queue in queues:
            while queue:
                call = queue.next()
                if calls and call.cost > left:
                    break
                if not call.answer.done() and call.deadline <= time.monotonic():
                    call.answer.set_exception(ExpiredError())
                runs = not call.answer.done()
                queue.remove(call, runs)
                if runs:
                    calls.append(call)
                    left -= call.cost
        served = len(self._bulk) < bulk_before or not self._bulk
        self._passed_over = 0 if served else self._passed_over + 1
        return calls

    async def _answer(self, calls: list[_Call[Item, Result]]) -> None:
        now = time.monotonic()
        for call in calls:
            self._observe(now - call.arrived)
        for group in (calls, *([call] for call in calls)):
            open_calls = [call for call in group if not call.answer.done()]
            if not open_calls:
                continue
            try:
                results = await self._in_thread(partial(self._run, [call.item for call in open_calls]))
            except Exception as error:
                if len(group) == 1:
                    _settle(open_calls[0], error)
                continue
            for call, result in zip(open_calls, results, strict=True):
                if not call.answer.done():
                    call.answer.set_result(result)

    def _in_thread(self, action: Callable[[], Other]) -> asyncio.Future[Other]:
        return asyncio.get_running_loop().run_in_executor(self._thread, action)


def _settle(call: _Call[Item, Result], error: Exception) -> None:
    if not call.answer.done():
        call.answer.set_exception(error)
