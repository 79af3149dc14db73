"""Attacks with searched suffixes: one for all requests, or one for each request."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from reft_ray.core.conversation import Example
from reft_ray.experiments.attacks.datasets import Attack, with_prompt
from reft_ray.experiments.attacks.disguises import Disguise
from reft_ray.experiments.attacks.token_search import Found, TokenSearch

SUFFIXES = frozenset({"suffix for all", "suffix each"})


def suffix_attacks(
    search: TokenSearch, harmful: Sequence[Example], count: int, shared_by: int, single: int, log: Callable[[str], None]
) -> tuple[list[Attack], list[Found]]:
    """(attacks, found suffixes). The shared suffix is searched on requests that are not in its rows; requests that
    fill a window are skipped."""
    short = [row for row in harmful if search.fits(row.prompt[-1].content)]
    others, rows = short[:shared_by], short[shared_by : shared_by + count]
    log(f"searching one suffix on {len(others)} requests")
    shared = search.suffix([row.prompt[-1].content for row in others])
    found = [shared]
    with_own_suffix: dict[str, str] = {}
    for index, row in enumerate(rows[:single]):
        log(f"searching suffix {index + 1} of {min(single, len(rows))}")
        text = row.prompt[-1].content
        found.append(search.suffix([text]))
        with_own_suffix[text] = text + found[-1].suffix
    disguise = Disguise("suffix for all", "", lambda text, _: text + shared.suffix)

    def with_shared(_: random.Random) -> list[Example]:
        return [with_prompt(row, row.prompt[-1].content + shared.suffix) for row in rows]

    def with_own(_: random.Random) -> list[Example]:
        return [with_prompt(row, with_own_suffix[row.prompt[-1].content]) for row in rows[:single]]

    return [
        Attack(
            disguise.name,
            f"one searched suffix, found on {len(others)} other requests (white box, greedy coordinate gradient)",
            with_shared,
            lambda _: rows,
            rewrite=disguise,
        ),
        Attack(
            "suffix each",
            "a searched suffix for each request (white box, greedy coordinate gradient)",
            with_own,
            lambda _: rows[:single],
        ),
    ], found
