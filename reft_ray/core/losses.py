"""Losses as sums over tokens or rows, and the global counts by which the caller divides them once.

Shape suffixes: B rows, N labelled positions, D width, V vocabulary, K kept soft labels, S sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from reft_ray.core.batch import Batch
from reft_ray.core.forward import AllReduce, Forward, Predictions, single_rank
from reft_ray.core.targets import ABSENT, SoftTargets

_PART_LOGITS = {"cpu": 1 << 23, "cuda": 1 << 27}
"""More logits than this are computed in parts: 170 positions of a vocabulary of 49,152 on a CPU, 1,046 of 128,256 on a
GPU, where fewer leave the head's matrix product waiting for memory."""

Loss = Callable[[Tensor, slice], Tensor]
"""Sums over some positions, [S], of their logits and places; the gradient is that of the first sum."""


class _SumInParts(torch.autograd.Function):
    """A loss of many positions, part by part, each with its gradient.

    No tensor over the whole vocabulary outlives its part: what is kept for the backward pass is the gradient of the
    head's input, and of the head's weights if they are trained.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, predictions: Predictions, loss: Loss, *weights: Tensor) -> Tensor:
        learned = [t for t, needed in zip((hidden_ND, *weights), _tensors(ctx.needs_input_grad), strict=True) if needed]
        ctx.gradients = [torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in learned]
        parts: list[Tensor] = []
        for where in _slices(predictions):
            part_ND = hidden_ND[where].detach().requires_grad_(ctx.needs_input_grad[0])
            with torch.set_grad_enabled(bool(learned)):
                sums = loss(predictions.head(part_ND), where)
                wanted = [part_ND if tensor is hidden_ND else tensor for tensor in learned]
                found = torch.autograd.grad(sums[0], wanted) if learned else ()
            for tensor, total, gradient in zip(learned, ctx.gradients, found, strict=False):
                # The head's input has a gradient per position, its weights have one sum.
                (total[where] if tensor is hidden_ND else total).add_(gradient)
            parts.append(sums.detach())
        return torch.stack(parts).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = iter(ctx.gradients), None
        return tuple(next(gradients).mul_(upstream[0]) if needed else None for needed in ctx.needs_input_grad)


def _tensors(needed: tuple[bool, ...]) -> tuple[bool, ...]:
    """Of the arguments of `_SumInParts.forward`, those that are tensors: the first, and those after the third."""
    return (needed[0], *needed[3:])


def _slices(predictions: Predictions) -> list[slice]:
    most = _PART_LOGITS.get(predictions.hidden_ND.device.type, _PART_LOGITS["cpu"])
    positions = max(1, most // predictions.vocabulary)
    return [slice(first, first + positions) for first in range(0, len(predictions), positions)] or [slice(0)]


def over_positions(student: Tensor | Predictions, loss: Loss) -> Tensor:
    """`loss` of all positions, [S], called on some of them at a time and in order."""
    predictions = Predictions.of(student)
    if len(_slices(predictions)) == 1:
        return loss(predictions.logits(), slice(None))
    total: Tensor = _SumInParts.apply(predictions.hidden_ND, predictions, loss, *predictions.weights)
    return total


def cross_entropy_sum(student: Tensor | Predictions, labels_N: Tensor) -> Tensor:
    """Sum over positions of -log p(label), in nats."""
    return cross_entropy_and_correct(student, labels_N)[0]


def cross_entropy_and_correct(student: Tensor | Predictions, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """That sum, and how many positions have their label as the most likely token, which has no gradient."""

    def loss(part_NV: Tensor, where: slice) -> Tensor:
        entropy = F.cross_entropy(part_NV.float(), labels_N[where], reduction="sum")
        correct = (part_NV.detach().argmax(dim=-1) == labels_N[where]).sum()
        return torch.stack([entropy, correct.to(entropy.dtype)])

    entropy, correct = over_positions(student, loss).unbind()
    return entropy, correct.detach()


def weighted_cross_entropy(student: Tensor | Predictions, labels_N: Tensor, weight_NS: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of -log p(label) under the sum of each position's weights, and the sums [S] under each weight alone."""

    def loss(part_NV: Tensor, where: slice) -> Tensor:
        entropy_N = F.cross_entropy(part_NV.float(), labels_N[where], reduction="none")
        each_S = (weight_NS[where].to(entropy_N.dtype) * entropy_N[:, None]).sum(0)
        return torch.cat([each_S.sum()[None], each_S.detach()])

    sums = over_positions(student, loss)
    return sums[0], sums[1:].detach()


def divergence_sum(
    teacher: Tensor | Predictions | SoftTargets, student: Tensor | Predictions, temperature: float = 1.0
) -> Tensor:
    """Sum over positions of KL(teacher || student) in nats; the teacher's logits [N, V] or stored soft labels."""
    if isinstance(teacher, SoftTargets):
        return topk_kl_sum(teacher, student, temperature)
    return kl_sum(teacher, student, temperature)


def label_counts(*streams: Sequence[Batch], all_reduce: AllReduce) -> tuple[int, ...]:
    """Labelled positions of each stream over all ranks, in one reduction."""
    counts = [float(sum(batch.labelled for batch in stream)) for stream in streams]
    return tuple(int(count) for count in all_reduce(torch.tensor(counts, dtype=torch.float64)).tolist())


def terms_sum(parts: Sequence[Tensor]) -> Tensor:
    """The sum of detached terms of micro-batches in float64: on their device, without waiting for it."""
    return torch.stack([part.to(parts[-1].device, torch.float64) for part in parts]).sum(0)


def kl_sum(teacher: Tensor | Predictions, student: Tensor | Predictions, temperature: float = 1.0) -> Tensor:
    """Sum over positions of KL(teacher || student) from logits at a temperature, in nats. The teacher is detached."""
    source = Predictions.of(teacher)

    def loss(part_NV: Tensor, where: slice) -> Tensor:
        with torch.no_grad():
            teacher_log = F.log_softmax(source.logits(where).float() / temperature, dim=-1)
        student_log = F.log_softmax(part_NV.float() / temperature, dim=-1)
        return F.kl_div(student_log, teacher_log, reduction="sum", log_target=True)[None]

    return over_positions(student, loss)[0]


def topk_kl_sum(targets: SoftTargets, student: Tensor | Predictions, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) over the K kept tokens and, as one outcome more, the tail; in nats.

    Merging outcomes never increases a KL divergence, so this is a lower bound of `kl_sum`; the two are equal
    for K = V. The temperature must be the one the targets were made with.
    """

    def loss(part_NV: Tensor, where: slice) -> Tensor:
        part_NV = part_NV.float() / temperature
        # The log-probabilities of the K tokens alone: nothing over the vocabulary is kept but what logsumexp needs.
        student_NK = part_NV.gather(-1, targets.ids_NK[where].long()) - part_NV.logsumexp(-1, keepdim=True)
        teacher_NK = targets.logprobs_NK[where].float()
        kept = (teacher_NK.exp() * (teacher_NK - student_NK)).sum()
        tail_N = targets.tail_N[where].float()
        # log(1 - sum q) through log1p stays finite where the student puts all its mass on the kept tokens.
        student_kept_N = torch.where(teacher_NK > ABSENT, student_NK.exp(), 0.0).sum(-1)
        student_tail_N = torch.log1p(-student_kept_N.clamp(max=1.0 - 1e-7))
        tail = torch.where(tail_N > 0, tail_N * (tail_N.clamp_min(1e-12).log() - student_tail_N), 0.0)
        return (kept + tail.sum())[None]

    return over_positions(student, loss)[0]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Over all labelled positions: `loss` in nats per token, `accuracy` the share of labels that were most likely."""

    loss: float
    accuracy: float
    tokens: int


@torch.no_grad()
def held_out(model: Forward, batches: Sequence[Batch], all_reduce: AllReduce = single_rank) -> HeldOut | None:
    """The figures of all ranks' batches together, None without a token; every rank must call it."""
    sums = [torch.zeros(3)]
    for batch in batches:
        loss, correct = cross_entropy_and_correct(model.predictions(batch), batch.labels_N)
        sums.append(torch.stack([loss, correct, loss.new_tensor(batch.labelled)]))
    loss_sum, correct_tokens, tokens = all_reduce(terms_sum(sums)).tolist()
    return HeldOut(loss_sum / tokens, correct_tokens / tokens, int(tokens)) if tokens else None
