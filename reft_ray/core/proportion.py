"""A share of counted things with its 95 % confidence interval."""

from __future__ import annotations

import math
from dataclasses import dataclass

_Z = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Share:
    """`count` of `of`, with Wilson's interval; the bounds are in [0, 1]."""

    count: int
    of: int

    @property
    def value(self) -> float | None:
        """The share; None of nothing."""
        return self.count / self.of if self.of else None

    @property
    def bounds(self) -> tuple[float, float]:
        """The interval; all of [0, 1] for a share of nothing."""
        return wilson(self.count, self.of) if self.of else (0.0, 1.0)


def wilson(count: int, n: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion at 95 %, in [0, 1]."""
    share = count / n
    centre = share + _Z**2 / (2 * n)
    spread = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    scale = 1 + _Z**2 / n
    low = 0.0 if count == 0 else (centre - spread) / scale
    high = 1.0 if count == n else (centre + spread) / scale
    return low, high
