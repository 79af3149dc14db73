"""The next token of each row of a batch, each under its own sampling parameters.

A row's token depends only on its own logits, history and random numbers, so that a seed gives the same completion in
any batch (up to the last bits of the logits, which depend on the batch's shape).

Shape suffixes: B rows, S sampled rows, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from reft_ray.core.completion import Sampling


class TokenScore(NamedTuple):
    """The log probability of a token, and the most likely tokens at its place."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(slots=True, eq=False)
class DecodingRow:
    """A completion in progress: sampling parameters, prompt ids, the adapter's key (None: the base), tokens so far.

    `score` is that of the last token, where `sampling.logprobs` asks for it.
    """

    sampling: Sampling
    prompt: list[int] = field(default_factory=list)
    adapter: str | None = None
    tokens: list[int] = field(default_factory=list)
    score: TokenScore | None = None
    random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = random.Random(self.sampling.seed)  # noqa: S311 - not a secret


def next_tokens(logits_BV: Tensor, rows: Sequence[DecodingRow]) -> list[int | None]:
    """One token per row, not yet appended to it; None for a row with NaN logits."""
    logits_BV = logits_BV.float()
    broken = torch.isnan(logits_BV).any(dim=1).tolist()
    penalized_BV = _penalized(logits_BV, rows)
    tokens: list[int] = penalized_BV.argmax(dim=1).tolist()
    sampled = [i for i, row in enumerate(rows) if row.sampling.temperature > 0 and not broken[i]]
    if sampled:
        for index, token in zip(sampled, _sampled(penalized_BV[sampled], [rows[i] for i in sampled]), strict=True):
            tokens[index] = token
    for index, row in enumerate(rows):
        if row.sampling.logprobs is not None and not broken[index]:
            (row.score,) = token_scores(logits_BV[index : index + 1], tokens[index : index + 1], row.sampling.logprobs)
    return [None if bad else token for token, bad in zip(tokens, broken, strict=True)]


def token_scores(logits_TV: Tensor, tokens: Sequence[int], top: int) -> list[TokenScore]:
    """The scores of tokens under the logits before them, one of each per row."""
    logprob_TV = logits_TV.float().log_softmax(dim=1)
    chosen = torch.tensor(tokens, device=logits_TV.device)[:, None]
    values, ids = logprob_TV.topk(min(top, logits_TV.shape[1]), dim=1)
    return [
        TokenScore(logprob, tuple(zip(best_ids, best, strict=True)))
        for logprob, best_ids, best in zip(
            logprob_TV.gather(1, chosen)[:, 0].tolist(), ids.tolist(), values.tolist(), strict=True
        )
    ]


def _penalized(logits_BV: Tensor, rows: Sequence[DecodingRow]) -> Tensor:
    """Subtract OpenAI's penalties: presence once per token that occurred, frequency once per occurrence."""
    logits_BV = logits_BV.clone()
    for index, row in enumerate(rows):
        presence, frequency = row.sampling.presence_penalty, row.sampling.frequency_penalty
        if row.tokens and (presence or frequency):
            ids, counts = torch.tensor(row.tokens, device=logits_BV.device).unique(return_counts=True)
            logits_BV[index, ids] -= presence + frequency * counts.float()
    return logits_BV


def _sampled(logits_SV: Tensor, rows: Sequence[DecodingRow]) -> list[int]:
    """Sample by the inverse of each row's cumulative probability, in the order of the vocabulary."""
    device = logits_SV.device
    temperature_S1 = torch.tensor([[row.sampling.temperature] for row in rows], device=device)
    probability_SV = (logits_SV / temperature_S1.clamp_min(1e-4)).softmax(dim=1)
    if any(row.sampling.top_p < 1 for row in rows):
        probability_SV = _nucleus(probability_SV, [row.sampling.top_p for row in rows])
    total_SV = probability_SV.cumsum(dim=1)
    wanted_S1 = torch.tensor([[row.random.random()] for row in rows], device=device) * total_SV[:, -1:]
    token_S = torch.searchsorted(total_SV, wanted_S1, right=True)[:, 0]
    # Rounding may point past the last token that has any probability.
    last_S = (probability_SV > 0).long().cumsum(dim=1).argmax(dim=1)
    tokens: list[int] = torch.minimum(token_S, last_S).tolist()
    return tokens


def _nucleus(probability_SV: Tensor, top_p: Sequence[float]) -> Tensor:
    """Zero what is outside each row's top_p; rows with 1 stay exactly as they are."""
    limit_S1 = torch.tensor([[p if p < 1 else math.inf] for p in top_p], device=probability_SV.device)
    sorted_SV, order_SV = probability_SV.sort(dim=1, descending=True, stable=True)
    # The first token that reaches top_p belongs to the nucleus, so that it is never empty.
    outside_SV = sorted_SV.cumsum(dim=1) - sorted_SV >= limit_S1
    return torch.zeros_like(probability_SV).scatter(1, order_SV, sorted_SV.masked_fill(outside_SV, 0.0))
