"""The optimiser and its schedule: AdamW, warm-up, cosine, global-norm clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from reft_ray.core.refusal import AllReduce, single_rank


def adamw(parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with decay on matrices only: biases, norms and other vectors keep their scale."""
    trainable = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=(0.9, 0.999))


def learning_rate_at(progress: float, peak: float, warmup: float, floor: float = 0.0) -> float:
    """Linear warm-up over the first `warmup` share of the run, then cosine to `floor` * peak.

    `progress` is the share of rows trained, in [0, 1]: a schedule by rows is the same for any number of workers.
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < warmup:
        return peak * progress / warmup
    cosine = 0.5 * (1.0 + math.cos(math.pi * (progress - warmup) / max(1.0 - warmup, 1e-9)))
    return peak * (floor + (1.0 - floor) * cosine)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Use one learning rate for every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def reduce_gradients(parameters: Iterable[nn.Parameter], all_reduce: AllReduce = single_rank) -> None:
    """Sum gradients over ranks in one flat tensor per dtype; a rank without a gradient adds zeros."""
    if all_reduce is single_rank:
        return
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
    for group in by_dtype.values():
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in group]
        flat = all_reduce(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        for parameter, part in zip(group, flat.split([p.numel() for p in group]), strict=True):
            parameter.grad = part.view_as(parameter)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients to a global norm of at most `max_norm`; returns the norm before."""
    return nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], max_norm)
