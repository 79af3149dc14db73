"""Gradient conflict between task and safety: the reason given for soft labels, filtering and the base start.

conflict = cos(grad L_task, grad L_align), over all trained parameters; negative if one undoes the other
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from reft_ray.core.batch import Batch
from reft_ray.core.forward import Forward
from reft_ray.core.guided import Distillation, guided_step


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
    distillation: Distillation,
) -> Conflict:
    """Compare the two terms of the guided loss on the same weights; leaves no gradient.

    Raises ValueError if one of them has none.
    """
    guided_step(student, user)
    task = _taken(parameters)
    guided_step(student, [], alignment, replace(distillation, alpha=1.0))
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
