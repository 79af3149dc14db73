"""The optimiser, its schedule and its step: AdamW, warm-up, cosine, global-norm clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from reft_ray.core.errors import ReftError
from reft_ray.core.forward import AllReduce, single_rank

BETAS = (0.9, 0.999)


def adamw(parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with decay on matrices only: biases, norms and other vectors keep their scale.

    On a GPU one kernel updates all of them.
    """
    groups = decay_groups(parameters, weight_decay)
    fused = bool(groups) and all(p.is_cuda for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, fused=fused)


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """The trained parameters as an optimiser's groups: matrices with decay, vectors without."""
    trainable = [p for p in parameters if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


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


def optimizer_step(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    shares: Mapping[str, Tensor],
    number: int,
    max_norm: float,
    all_reduce: AllReduce = single_rank,
    gradient_reduce: AllReduce = single_rank,
) -> dict[str, float]:
    """Sum gradients and loss terms over ranks, clip to a global norm of `max_norm`, update, and clear the gradients.

    Returns the terms, and `gradient_norm` before clipping: the one place of a step that waits for the device. Raises
    ReftError on every rank, before the update, for a term or norm that is not finite; `number` is the step's.
    """
    reduce_gradients(parameters, gradient_reduce)
    norm = nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], max_norm)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    terms = all_reduce(torch.stack([share.to(norm.device, torch.float64) for share in shares.values()]))
    found = dict(zip((*shares, "gradient_norm"), [*terms.tolist(), float(norm)], strict=True))
    for name, value in found.items():
        if not math.isfinite(value):
            raise ReftError(
                f"step {number}: {name} is {value}: start a new run with a lower optimizer.learning_rate or "
                "precision=float32"
            )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return found
