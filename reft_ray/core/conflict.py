"""Gradient conflict between task and safety: the reason given for soft labels, filtering and the base start.

conflict = cos(grad L_task, grad L_align), over all trained parameters; negative where one undoes the other
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reft_ray.core.batch import Batch
from reft_ray.core.forward import Forward
from reft_ray.core.guided import AlignmentLoss, guided_step


@dataclass(frozen=True, slots=True)
class Conflict:
    """The cosine of the two gradients in [-1, 1], and their norms."""

    cosine: float
    task_norm: float
    safety_norm: float


def gradient_conflict(
    student: Forward,
    parameters: Sequence[nn.Parameter],
    user: Sequence[Batch],
    alignment: Sequence[Batch],
    alignment_loss: AlignmentLoss,
) -> Conflict:
    """Both terms of the guided loss apart, on the same weights; no gradient is left behind.

    Raises ValueError where one of them has none.
    """
    guided_step(student, user)
    task = _taken(parameters)
    guided_step(student, [], alignment, alignment_loss)
    safety = _taken(parameters)
    norms = float(task.norm()), float(safety.norm())
    if not all(norms):
        raise ValueError(f"a conflict needs two gradients, their norms are {norms}")
    return Conflict(float(task @ safety) / (norms[0] * norms[1]), *norms)


def _taken(parameters: Sequence[nn.Parameter]) -> Tensor:
    """All gradients as one vector in float64, removed from the parameters."""
    flat = [(torch.zeros_like(p) if p.grad is None else p.grad).detach().double().reshape(-1) for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return torch.cat(flat)
