"""Losses as sums over tokens or rows, and the global counts by which the caller divides them once.

Shape suffixes: B rows, N labelled positions, V vocabulary, K kept soft labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from reft_ray.core.batch import Batch
from reft_ray.core.forward import AllReduce
from reft_ray.core.targets import SoftTargets

_PART_LOGITS = 1 << 23
"""More logits than this are read in parts of that many: 170 positions of a vocabulary of 49,152."""


class _SumInParts(torch.autograd.Function):
    """A loss of many positions, part by part, each with its gradient.

    A softmax over the vocabulary keeps several tensors as large as the logits for its backward pass; in parts, the
    gradient is the only one of that size.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, loss: Callable[[Tensor, slice], Tensor], positions: int) -> Tensor:
        ctx.gradient = torch.empty_like(logits_NV) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), device=logits_NV.device)
        for first in range(0, len(logits_NV), positions):
            where = slice(first, first + positions)
            part_NV = logits_NV[where].detach()
            with torch.set_grad_enabled(ctx.gradient is not None):
                value = loss(part_NV.requires_grad_(ctx.gradient is not None), where)
                if ctx.gradient is not None:
                    ctx.gradient[where] = torch.autograd.grad(value, part_NV)[0]
            total += value.detach()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(upstream), None, None


def _over_positions(logits_NV: Tensor, loss: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """`loss(logits, positions)` of all positions, which is a sum over them."""
    if logits_NV.numel() <= _PART_LOGITS:
        return loss(logits_NV, slice(None))
    total: Tensor = _SumInParts.apply(logits_NV, loss, max(1, _PART_LOGITS // logits_NV.shape[1]))
    return total


def cross_entropy_sum(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Sum over positions of -log p(label), in nats."""

    def loss(part_NV: Tensor, where: slice) -> Tensor:
        return F.cross_entropy(part_NV.float(), labels_N[where], reduction="sum")

    return _over_positions(logits_NV, loss)


def correct_sum(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """How many positions have their label as the most likely token; not a loss, without a gradient."""
    return (logits_NV.detach().argmax(dim=-1) == labels_N).sum()


def divergence_sum(teacher: Tensor | SoftTargets, student_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """Sum over positions of KL(teacher || student) in nats; the teacher is logits [N, V] or stored soft labels."""
    divergence = kl_sum if isinstance(teacher, Tensor) else topk_kl_sum
    return divergence(teacher, student_NV, temperature)  # type: ignore[arg-type]


def label_counts(*streams: Sequence[Batch], all_reduce: AllReduce) -> tuple[int, ...]:
    """Labelled positions of each stream over all ranks, in one reduction."""
    counts = [float(sum(batch.labelled for batch in stream)) for stream in streams]
    return tuple(int(count) for count in all_reduce(torch.tensor(counts, dtype=torch.float64)).tolist())


def terms_sum(parts: Sequence[Tensor]) -> Tensor:
    """The sum of detached terms of micro-batches in float64: on their device, without waiting for it."""
    return torch.stack([part.to(parts[-1].device, torch.float64) for part in parts]).sum(0)


def kl_sum(teacher_NV: Tensor, student_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """Sum over positions of KL(teacher || student) from logits at a temperature, in nats. The teacher is detached."""

    def loss(part_NV: Tensor, where: slice) -> Tensor:
        teacher_log = F.log_softmax(teacher_NV[where].detach().float() / temperature, dim=-1)
        student_log = F.log_softmax(part_NV.float() / temperature, dim=-1)
        return F.kl_div(student_log, teacher_log, reduction="sum", log_target=True)

    return _over_positions(student_NV, loss)


def topk_kl_sum(targets: SoftTargets, student_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) over the K kept tokens and, as one outcome more, the tail; in nats.

    Merging outcomes never increases a KL divergence, so this is a lower bound of `kl_sum`; the two are equal
    for K = V. The temperature must be the one the targets were made with.
    """

    def loss(part_NV: Tensor, where: slice) -> Tensor:
        student_log = F.log_softmax(part_NV.float() / temperature, dim=-1)
        student_NK = student_log.gather(-1, targets.ids_NK[where].long())
        teacher_NK = targets.logprobs_NK[where].float()
        kept = (teacher_NK.exp() * (teacher_NK - student_NK)).sum()
        tail_N = targets.tail_N[where].float()
        # log(1 - sum q) through log1p stays finite where the student puts all its mass on the kept tokens.
        student_tail_N = torch.log1p(-student_NK.exp().sum(-1).clamp(max=1.0 - 1e-7))
        tail = torch.where(tail_N > 0, tail_N * (tail_N.clamp_min(1e-12).log() - student_tail_N), 0.0)
        return kept + tail.sum()

    return _over_positions(student_NV, loss)
