"""The next token of each row of a batch, each by its own rules.

A row's choice depends on its own logits, history and random numbers alone, so that a seed gives the same completion
whoever shares the batch (up to the last bits of the logits, which depend on the batch's shape).

Shape suffixes: B rows, S rows that are sampled, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from reft_ray.core.completion import Sampling


@dataclass(slots=True)
class Draw:
    """One row: its rules, its random numbers, and the tokens that it has already."""

    sampling: Sampling
    random: random.Random
    tokens: list[int] = field(default_factory=list)

    @classmethod
    def start(cls, sampling: Sampling) -> Draw:
        """A row without tokens; without a seed it has one of its own."""
        return cls(sampling, random.Random(sampling.seed))  # noqa: S311 - not a secret


def choose(logits_BV: Tensor, rows: Sequence[Draw]) -> list[int | None]:
    """One token per row, not yet recorded in it; None for a row whose logits are no numbers."""
    logits_BV = logits_BV.float()
    broken = torch.isnan(logits_BV).any(dim=1).tolist()
    logits_BV = _penalised(logits_BV, rows)
    chosen: list[int | None] = logits_BV.argmax(dim=1).tolist()
    for nucleus in (False, True):
        sampled = [
            index
            for index, row in enumerate(rows)
            if row.sampling.temperature > 0 and not broken[index] and (row.sampling.top_p < 1) == nucleus
        ]
        if sampled:
            for index, token in zip(sampled, _drawn(logits_BV[sampled], [rows[i] for i in sampled]), strict=True):
                chosen[index] = token
    return [None if bad else token for token, bad in zip(chosen, broken, strict=True)]


def _penalised(logits_BV: Tensor, rows: Sequence[Draw]) -> Tensor:
    """OpenAI's penalties: subtracted once per token that occurs, and once per occurrence."""
    marked = [i for i, row in enumerate(rows) if row.tokens and _penalises(row.sampling)]
    if not marked:
        return logits_BV
    logits_BV = logits_BV.clone()
    for index in marked:
        sampling = rows[index].sampling
        ids, counts = torch.tensor(rows[index].tokens, device=logits_BV.device).unique(return_counts=True)
        logits_BV[index, ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts.float()
    return logits_BV


def _penalises(sampling: Sampling) -> bool:
    return sampling.presence_penalty != 0 or sampling.frequency_penalty != 0


def _drawn(logits_SV: Tensor, rows: Sequence[Draw]) -> list[int]:
    """Draw by the inverse of each row's cumulative probability; all rows have a nucleus, or none has."""
    temperature_S1 = torch.tensor([[row.sampling.temperature] for row in rows], device=logits_SV.device)
    probability_SV = (logits_SV / temperature_S1.clamp_min(1e-4)).softmax(dim=1)
    top_p = [row.sampling.top_p for row in rows]
    order_SV = None
    if min(top_p) < 1:
        probability_SV, order_SV = probability_SV.sort(dim=1, descending=True, stable=True)
        before_SV = probability_SV.cumsum(dim=1) - probability_SV
        # The first token that reaches top_p belongs to the nucleus, so that it is never empty.
        outside_SV = before_SV >= torch.tensor(top_p, device=logits_SV.device)[:, None]
        probability_SV = probability_SV.masked_fill(outside_SV, 0.0)
    total_SV = probability_SV.cumsum(dim=1)
    wanted_S1 = torch.tensor([[row.random.random()] for row in rows], device=logits_SV.device) * total_SV[:, -1:]
    place_S1 = torch.searchsorted(total_SV, wanted_S1, right=True).clamp_max(total_SV.shape[1] - 1)
    # Rounding may point behind the last token that has any probability.
    last_S1 = (probability_SV > 0).long().cumsum(dim=1).argmax(dim=1, keepdim=True)
    place_S1 = torch.minimum(place_S1, last_S1)
    tokens_S1 = place_S1 if order_SV is None else order_SV.gather(1, place_S1)
    tokens: list[int] = tokens_S1[:, 0].tolist()
    return tokens
