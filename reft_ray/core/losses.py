"""Losses as sums over tokens or rows, and the global counts by which the caller divides them once.

Shape suffixes: B rows, N labelled positions, V vocabulary, K kept soft labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from reft_ray.core.batch import Batch
from reft_ray.core.forward import AllReduce
from reft_ray.core.targets import SoftTargets


def cross_entropy_sum(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Sum over positions of -log p(label), in nats."""
    return F.cross_entropy(logits_NV.float(), labels_N, reduction="sum")


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
    teacher_log = F.log_softmax(teacher_NV.detach().float() / temperature, dim=-1)
    student_log = F.log_softmax(student_NV.float() / temperature, dim=-1)
    return F.kl_div(student_log, teacher_log, reduction="sum", log_target=True)


def topk_kl_sum(targets: SoftTargets, student_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) over the K kept tokens and, as one outcome more, the tail; in nats.

    Merging outcomes never increases a KL divergence, so this is a lower bound of `kl_sum`; the two are equal
    for K = V. The temperature must be the one the targets were made with.
    """
    student_log = F.log_softmax(student_NV.float() / temperature, dim=-1)
    student_NK = student_log.gather(-1, targets.ids_NK.long())
    teacher_NK = targets.logprobs_NK.float()
    kept = (teacher_NK.exp() * (teacher_NK - student_NK)).sum()
    tail_N = targets.tail_N.float()
    # log(1 - sum q) through log1p stays finite where the student puts all its mass on the kept tokens.
    student_tail_N = torch.log1p(-student_NK.exp().sum(-1).clamp(max=1.0 - 1e-7))
    tail = torch.where(tail_N > 0, tail_N * (tail_N.clamp_min(1e-12).log() - student_tail_N), 0.0)
    return kept + tail.sum()
