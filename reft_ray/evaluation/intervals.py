"""Shares of prompts in percent, with 95 % confidence intervals.

The interval is a bootstrap over prompts. If every prompt had the same outcome, all resamples are equal and its width is
zero; Wilson's interval is used instead, which for 0 of 300 extends to 1.3 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reft_ray.core.proportion import wilson

LEVEL = 0.95
RESAMPLES = 2000
_CHUNK_DRAWS = 4_000_000


@dataclass(frozen=True, slots=True)
class Measure:
    """A share of `n` prompts: `value`, `low` and `high` are percentages in [0, 100]."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, hits: Sequence[bool], seed: int = 0) -> Measure:
        """The share of true outcomes. Raises ValueError if `hits` is empty."""
        if not hits:
            raise ValueError("a share needs at least one prompt")
        count = sum(hits)
        low, high = wilson(count, len(hits)) if count in (0, len(hits)) else bootstrap(hits, seed)
        return cls(100.0 * count / len(hits), 100.0 * low, 100.0 * high, len(hits))

    def as_dict(self) -> dict[str, float | int | list[float]]:
        """The JSON of reports."""
        return {"value": self.value, "interval": [self.low, self.high], "n": self.n}


def bootstrap(values: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Percentile bootstrap of a mean at 95 %; the same seed gives the same interval."""
    values_B = torch.tensor([float(value) for value in values], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    chunk = max(1, _CHUNK_DRAWS // len(values_B))
    means = torch.cat(
        [
            values_B[
                torch.randint(len(values_B), (min(chunk, resamples - at), len(values_B)), generator=generator)
            ].mean(1)
            for at in range(0, resamples, chunk)
        ]
    )
    return percentile_interval(means)


def percentile_interval(draws_R: Tensor) -> tuple[float, float]:
    """The central 95 % of float64 resamples [R]."""
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(draws_R, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high
