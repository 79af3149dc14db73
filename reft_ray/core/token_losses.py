"""Losses of a training loop that the client drives: per token, from the log-probability of a given target.

    cross_entropy         -w * logp
    importance_sampling   -A * r                                   r = exp(logp - logp of the sampler)
    ppo                   -min(A * r, A * clip(r, low, high))

Each is summed over tokens and not divided: the client's weights are its normalisation. Shape suffix: N positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from reft_ray.core.forward import Predictions
from reft_ray.core.loss_inputs import CLIP, LossName
from reft_ray.core.losses import over_positions

PerToken = Callable[[Tensor, slice], Tensor]
"""The loss [n] of some positions from their log-probabilities [n]."""


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """The summed loss, which has the gradient; log-probability and loss of each target; and the gradient's `mass`.

    The mass is the sum of |d loss / d logp| over positions: how much the loss pulls, in the unit of one token of plain
    cross entropy. It is 0 where gradients are off.
    """

    total: Tensor
    logprob_N: Tensor
    loss_N: Tensor
    mass: Tensor


def per_token(name: LossName, inputs: Mapping[str, Tensor], config: Mapping[str, float]) -> PerToken:
    """The loss of this name over positions with these inputs, [N] each."""

    def cross_entropy(logprob_N: Tensor, where: slice) -> Tensor:
        return -logprob_N * inputs["weights"][where]

    def ratio(logprob_N: Tensor, where: slice) -> Tensor:
        return torch.exp(logprob_N - inputs["logprobs"][where])

    def importance_sampling(logprob_N: Tensor, where: slice) -> Tensor:
        return -ratio(logprob_N, where) * inputs["advantages"][where]

    def ppo(logprob_N: Tensor, where: slice) -> Tensor:
        ratio_N, advantage_N = ratio(logprob_N, where), inputs["advantages"][where]
        clipped_N = ratio_N.clamp(*({**CLIP, **config}[bound] for bound in CLIP))
        return -torch.minimum(ratio_N * advantage_N, clipped_N * advantage_N)

    return {"cross_entropy": cross_entropy, "importance_sampling": importance_sampling, "ppo": ppo}[name]


def token_loss(student: Tensor | Predictions, targets_N: Tensor, loss: PerToken, kept_N: Tensor) -> TokenLoss:
    """The loss of the positions that are kept (1, others 0); the other outputs are of all positions."""
    found: list[tuple[Tensor, Tensor]] = []
    wants_gradient = torch.is_grad_enabled()

    def sums(part_NV: Tensor, where: slice) -> Tensor:
        logprob_N = -F.cross_entropy(part_NV.float(), targets_N[where], reduction="none")
        keeps_N = kept_N[where] > 0
        # Not products: a withheld token must add nothing even where its loss is infinite.
        loss_N = loss(torch.where(keeps_N, logprob_N, logprob_N.detach()), where)
        found.append((logprob_N.detach(), loss_N.detach()))
        total = torch.where(keeps_N, loss_N, 0.0).sum()
        mass = torch.zeros_like(total)
        if wants_gradient and logprob_N.requires_grad:
            (slope_N,) = torch.autograd.grad(total, logprob_N, retain_graph=True)
            mass = slope_N.abs().sum()
        return torch.stack([total, mass.detach()])

    total, mass = over_positions(student, sums).unbind()
    logprob_N, loss_N = (torch.cat(each) for each in zip(*found, strict=True))
    return TokenLoss(total, logprob_N, loss_N, mass.detach())
