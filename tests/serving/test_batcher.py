"""Calls are batched by cost, urgent first; failing, late and cancelled ones do not affect others."""

import asyncio
import threading
import time
from collections.abc import Coroutine, Sequence
from typing import Any

import pytest

from reft_ray.serving.batcher import Batcher, ExpiredError


class Runner:
    """Doubles numbers; waits while the gate is closed."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        assert self.gate.wait(10)
        if any(item < 0 for item in items):
            raise ValueError("negative")
        return [2 * item for item in items]


def later(seconds: float = 60) -> float:
    return time.monotonic() + seconds


async def queued(
    batcher: Batcher[int, int], runner: Runner, calls: list[tuple[int, int, bool]]
) -> list[asyncio.Task[int]]:
    """Submit calls (item, cost, urgent) while a first one keeps the runner busy."""
    runner.gate.clear()
    first = asyncio.create_task(batcher.submit(0, 1, later(), urgent=False))
    while not runner.batches:
        await asyncio.sleep(0.001)
    tasks = []
    for item, cost, urgent in calls:
        tasks.append(asyncio.create_task(batcher.submit(item, cost, later(), urgent)))
        await asyncio.sleep(0)
    return [first, *tasks]


def run(body: Coroutine[Any, Any, None]) -> None:
    asyncio.run(body)


def test_calls_that_arrive_during_a_batch_share_the_next_one() -> None:
    async def body() -> None:
        runner = Runner()
        batcher = Batcher(runner, budget=10)
        tasks = await queued(batcher, runner, [(item, 4, False) for item in range(1, 6)])
        assert batcher.waiting == 5
        runner.gate.set()
        assert await asyncio.gather(*tasks) == [0, 2, 4, 6, 8, 10]
        assert runner.batches == [[0], [1, 2], [3, 4], [5]]

    run(body())


def test_a_call_above_the_budget_runs_alone() -> None:
    async def body() -> None:
        runner = Runner()
        batcher = Batcher(runner, budget=10)
        tasks = await queued(batcher, runner, [(1, 50, False), (2, 3, False), (3, 3, False)])
        runner.gate.set()
        await asyncio.gather(*tasks)
        assert runner.batches == [[0], [1], [2, 3]]

    run(body())


def test_urgent_calls_run_first_and_bulk_calls_do_not_starve() -> None:
    async def body() -> None:
        runner = Runner()
        batcher = Batcher(runner, budget=1)
        calls = [(100, 1, False), *((item, 1, True) for item in range(1, 12))]
        tasks = await queued(batcher, runner, calls)
        runner.gate.set()
        await asyncio.gather(*tasks)
        order = [batch[0] for batch in runner.batches]
        assert order[1] == 1
        assert order.index(100) == 9
        assert sorted(order) == [0, *range(1, 12), 100]

    run(body())


def test_an_owner_with_many_calls_waits_for_the_others() -> None:
    async def body() -> None:
        runner = Runner()
        batcher = Batcher(runner, budget=2)
        runner.gate.clear()
        owners = ["many"] * 6 + ["few"] * 2
        calls = [batcher.submit(item, 1, later(), True, owner) for item, owner in enumerate(owners)]
        tasks = [asyncio.create_task(call) for call in calls]
        while not runner.batches:
            await asyncio.sleep(0.001)
        late = asyncio.create_task(batcher.submit(8, 2, later(), True, "late"))
        await asyncio.sleep(0)
        runner.gate.set()
        await asyncio.gather(*tasks, late)
        assert runner.batches == [[0, 6], [1, 7], [8], [2, 3], [4, 5]]

    run(body())


def test_a_bad_call_fails_alone() -> None:
    async def body() -> None:
        runner = Runner()
        batcher = Batcher(runner, budget=10)
        tasks = await queued(batcher, runner, [(1, 1, False), (-1, 1, False), (2, 1, False)])
        runner.gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert results[:2] == [0, 2]
        assert isinstance(results[2], ValueError)
        assert results[3] == 4

    run(body())


def test_late_and_cancelled_calls_are_not_run() -> None:
    async def body() -> None:
        runner = Runner()
        batcher = Batcher(runner, budget=10)
        first, cancelled = await queued(batcher, runner, [(1, 1, False)])
        late = asyncio.create_task(batcher.submit(2, 1, later(-1), urgent=False))
        await asyncio.sleep(0)
        cancelled.cancel()
        runner.gate.set()
        assert await first == 0
        with pytest.raises(ExpiredError):
            await late
        assert runner.batches == [[0]]
        assert batcher.waiting == 0

    run(body())


def test_an_action_runs_between_batches() -> None:
    async def body() -> None:
        runner = Runner()
        batcher = Batcher(runner, budget=1)
        tasks = await queued(batcher, runner, [(1, 1, False)])
        seen: list[int] = []
        alone = asyncio.create_task(batcher.alone(lambda: seen.append(len(runner.batches))))
        await asyncio.sleep(0.01)
        assert not seen
        runner.gate.set()
        await asyncio.gather(alone, *tasks)
        assert seen in ([1], [2])

    run(body())


def test_waiting_time_is_observed() -> None:
    async def body() -> None:
        waits: list[float] = []
        batcher = Batcher(Runner(), budget=10, observe=waits.append)
        await asyncio.gather(*(batcher.submit(item, 1, later(), urgent=False) for item in range(5)))
        assert len(waits) == 5
        assert min(waits) >= 0

    run(body())
