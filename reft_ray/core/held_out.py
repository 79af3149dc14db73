"""Loss and token accuracy on held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from reft_ray.core.batch import Batch
from reft_ray.core.forward import AllReduce, Forward, single_rank
from reft_ray.core.losses import cross_entropy_and_correct, terms_sum


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Over all labelled positions: `loss` in nats per token, `accuracy` the share of labels that were most likely."""

    loss: float
    accuracy: float
    tokens: int


@torch.no_grad()
def held_out(model: Forward, batches: Sequence[Batch], all_reduce: AllReduce = single_rank) -> HeldOut | None:
    """The figures of all ranks' batches together, None without a token; every rank must call it."""
    sums = [torch.zeros(3)]
    for batch in batches:
        loss, correct = cross_entropy_and_correct(model.predictions(batch), batch.labels_N)
        sums.append(torch.stack([loss, correct, loss.new_tensor(batch.labelled)]))
    loss_sum, correct_tokens, tokens = all_reduce(terms_sum(sums)).tolist()
    return HeldOut(loss_sum / tokens, correct_tokens / tokens, int(tokens)) if tokens else None
