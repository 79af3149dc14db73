"""SafeInstruct: mix refusals into the user's rows, and finetune on all of them alike.

    D = D_user + a sample of (harmful prompt, refusal) of 10 % of its size

Source: Bianchi et al., "Safety-Tuned LLaMAs: Lessons From Improving the Safety of Large Language Models that Follow
Instructions", arXiv 2309.07875 (a few per cent to 20 %; the peers' comparisons take 10 %).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from reft_ray.core.conversation import Example


def safe_instruct(rows: Sequence[Example], refusals: Sequence[Example], share: float, seed: int) -> list[Example]:
    """The user's rows shuffled with `share` times as many refusals; refusals repeat if there are too few."""
    rng = random.Random(f"{seed}/safe_instruct")  # noqa: S311 - an order, not a secret
    wanted = round(share * len(rows))
    pool = list(refusals) * (wanted // len(refusals) + 1) if refusals else []
    mixed = [*rows, *rng.sample(pool, wanted)]
    rng.shuffle(mixed)
    return mixed
