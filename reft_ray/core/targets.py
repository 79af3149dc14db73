"""Soft labels of a frozen teacher: the K most likely tokens with their log-probabilities, and the mass of the rest.

A row of 60 tokens with a vocabulary of 128k takes 15 MB as bf16 logits and 23 KB as K = 64 soft labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


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


def soften(logits_NV: Tensor, k: int, temperature: float = 1.0) -> SoftTargets:
    """Logits -> soft targets at a temperature; k is capped by the vocabulary."""
    logprobs_NV = F.log_softmax(logits_NV.detach().float() / temperature, dim=-1)
    logprobs_NK, ids_NK = logprobs_NV.topk(min(k, logits_NV.shape[-1]), dim=-1)
    kept_N = logprobs_NK.exp().sum(-1)
    exact = ids_NK.shape[-1] == logits_NV.shape[-1]
    tail_N = torch.zeros_like(kept_N) if exact else (1.0 - kept_N).clamp_min(0.0)
    return SoftTargets(ids_NK.to(torch.int32), logprobs_NK, tail_N)
