"""Soft labels of a frozen teacher: the K most likely tokens with their log-probabilities, and the mass of the rest.

A row of 60 tokens with a vocabulary of 128k takes 15 MB as bf16 logits, and at most 16 KB as K = 64 soft labels on disk
(`hf.soft_targets`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from reft_ray.core.forward import Predictions

ABSENT = -1e4
"""The log-probability of a place without a token: positions may keep fewer than K."""

_PART_LOGITS = 1 << 25


@dataclass(frozen=True, slots=True)
class SoftTargets:
    """Teacher probabilities at N positions: token ids, natural log-probabilities, and the tail's probability mass."""

    ids_NK: Tensor
    logprobs_NK: Tensor
    tail_N: Tensor

    def to(self, device: torch.device | str) -> SoftTargets:
        """The same targets on another device."""
        return SoftTargets(self.ids_NK.to(device), self.logprobs_NK.to(device), self.tail_N.to(device))


class TargetSource(Protocol):
    """A source of soft labels of an alignment set, by row index."""

    def rows(self, indices: Sequence[int]) -> SoftTargets:
        """The targets of these rows, concatenated."""
        ...


@torch.no_grad()
def soften(teacher: Tensor | Predictions, k: int, temperature: float = 1.0) -> SoftTargets:
    """Logits -> soft targets at a temperature, most likely token first; k is capped by the vocabulary."""
    predictions = Predictions.of(teacher)
    size = max(1, _PART_LOGITS // predictions.vocabulary)
    # Without any position there is one part, which has none.
    starts = range(0, len(predictions), size) or (0,)
    parts = [_soften(predictions.logits(slice(start, start + size)), k, temperature) for start in starts]
    return SoftTargets(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _soften(logits_NV: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    scaled_NV = logits_NV.float() / temperature
    top_NK, ids_NK = scaled_NV.topk(min(k, logits_NV.shape[-1]), dim=-1)
    logprobs_NK = top_NK - scaled_NV.logsumexp(-1, keepdim=True)
    kept_N = logprobs_NK.exp().sum(-1)
    exact = ids_NK.shape[-1] == logits_NV.shape[-1]
    tail_N = torch.zeros_like(kept_N) if exact else (1.0 - kept_N).clamp_min(0.0)
    return ids_NK.to(torch.int32), logprobs_NK, tail_N
