"""How well a model foretells rows that it does not learn from.

Shape suffixes: N trained positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from reft_ray.core.batch import Batch
from reft_ray.core.forward import Forward
from reft_ray.core.losses import correct_sum, cross_entropy_sum
from reft_ray.core.refusal import AllReduce, single_rank


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Over all trained positions: `loss` in nats per token, `accuracy` the share of tokens held likeliest."""

    loss: float
    accuracy: float
    tokens: int


@torch.no_grad()
def held_out(model: Forward, batches: Sequence[Batch], all_reduce: AllReduce = single_rank) -> HeldOut | None:
    """The figures of all ranks' batches together, None without a token; every rank must call it."""
    sums = torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        logits_NV = model(batch).logits_NV
        assert logits_NV is not None
        loss, correct = cross_entropy_sum(logits_NV, batch.targets_N), correct_sum(logits_NV, batch.targets_N)
        sums += torch.tensor([float(loss), float(correct), len(batch.targets_N)], dtype=torch.float64)
    loss_sum, correct_tokens, tokens = all_reduce(sums).tolist()
    return HeldOut(loss_sum / tokens, correct_tokens / tokens, int(tokens)) if tokens else None
