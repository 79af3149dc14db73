"""Who is served first: calls before rows, projects in turn, refusals one after another."""

from __future__ import annotations

import asyncio
import time

import pytest

from reft_ray.api import admission, shares
from reft_ray.api.admission import Admission
from reft_ray.api.limits import LimitTable
from reft_ray.api.moderator import PIECE_ROWS, LocalModerator
from reft_ray.api.settings import FilterSettings
from reft_ray.api.shares import OWNER, Shares, call_at_work, step_aside
from reft_ray.core.conversation import chat
from reft_ray.testbed.word_scorer import WordScorer


def test_owners_are_served_in_turn():
    served = []

    async def one(slots, owner):
        async with slots.held(owner):
            served.append(owner)

    async def all_of_them():
        slots = Shares(1)
        await slots.wait("a")
        calls = [asyncio.create_task(one(slots, owner)) for owner in ("a", "a", "b", "b")]
        await asyncio.sleep(0)
        slots.give("a")
        await asyncio.gather(*calls)

    asyncio.run(all_of_them())
    assert served == ["b", "a", "b", "a"]


@pytest.mark.parametrize(("caller", "waits"), [("other", True), ("rows", False)])
def test_rows_wait_for_a_new_call_of_another_owner(monkeypatch, caller, waits):
    monkeypatch.setattr(shares, "LONGEST_ASIDE", 600)
    monkeypatch.setattr(shares, "NEW_SECONDS", 600)

    async def rows():
        OWNER.set("rows")
        await step_aside(Shares(1))

    async def beside():
        with call_at_work() as call:
            call.owner = caller
            stepping = asyncio.create_task(rows())
            for _ in range(5):
                await asyncio.sleep(0.002)
            assert stepping.done() is not waits
        await stepping

    asyncio.run(beside())


def test_rows_do_not_wait_for_a_call_that_takes_long(monkeypatch):
    monkeypatch.setattr(shares, "LONGEST_ASIDE", 600)

    async def beside():
        with call_at_work() as call:
            call.owner, call.begun = "other", time.monotonic() - 1
            await step_aside(Shares(1))

    asyncio.run(beside())


def test_projects_take_turns_between_pieces_of_a_large_call():
    seen = []

    class Recording(WordScorer):
        def score(self, texts):
            seen.extend(texts)
            return super().score(texts)

    async def judged(moderator, owner, rows):
        OWNER.set(owner)
        texts = [chat(f"{owner} {row}") for row in range(rows)]
        return await moderator.judge(texts, None, time.monotonic() + 60)

    async def both():
        moderator = LocalModerator(Recording())
        large = asyncio.create_task(judged(moderator, "large", 3 * PIECE_ROWS))
        await asyncio.sleep(0)
        small = await judged(moderator, "small", 1)
        return len((await large).verdicts), len(small.verdicts)

    assert asyncio.run(both()) == (3 * PIECE_ROWS, 1)
    assert seen.index("small 0") == PIECE_ROWS


def test_refusals_of_one_project_come_one_after_another(monkeypatch):
    waits = []

    async def sleep(seconds):
        waits.append(round(seconds, 2))

    async def refused():
        gate = Admission(lambda *_: None, FilterSettings(), LimitTable([]))
        clock = asyncio.get_running_loop().time()
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: clock)
        monkeypatch.setattr(admission.asyncio, "sleep", sleep)
        for project in ("a", "a", "a", "b", *["a"] * 200):
            await gate._refuse_slowly(project)

    asyncio.run(refused())
    assert waits[:4] == [0, 0.05, 0.1, 0]
    assert max(waits) == admission.LONGEST_REFUSAL
