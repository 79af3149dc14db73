"""Preference pairs (DPO, arXiv 2305.18290) as weights of a cross entropy.

    m_i = beta * ((log pi(c_i) - log pi_0(c_i)) - (log pi(r_i) - log pi_0(r_i)))
    L   = - sum_i log sigmoid(m_i) / pairs  -  sft_weight * sum_i log pi(c_i) / tokens of chosen answers

c_i is the chosen and r_i the rejected answer of pair i, pi the student, pi_0 the weights at the start. The gradient of
the first term is that of a cross entropy in which a token of c_i weighs beta * sigmoid(-m_i) / pairs, and one of r_i as
much below zero. So the two answers of a pair need not be in one micro-batch, nor on one rank: their log-probabilities
are found first, without a gradient.

Shape suffixes: B rows of a batch, N labelled positions of it, P pairs of the step, R = 2 P answers: chosen 2 i,
rejected 2 i + 1, which is the `index` of their rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from reft_ray.core.batch import Batch
from reft_ray.core.forward import AllReduce, Forward, single_rank
from reft_ray.core.guided import Distillation, GuidedTerms, guided_step
from reft_ray.core.losses import weighted_cross_entropy


@dataclass(frozen=True, slots=True)
class Dpo:
    """The weights of the loss, and how many pairs a step has at most."""

    beta: float = 0.1
    sft_weight: float = 0.2
    most_pairs: int = 16


@torch.no_grad()
def answer_log_probabilities(model: Forward, batches: Sequence[Batch], answers: int) -> Tensor:
    """log p of each answer under the model, [R] in float64; 0 for answers that are not in these batches."""
    found_R = torch.zeros(answers, dtype=torch.float64)
    for batch in batches:
        rows_NB = F.one_hot(batch.row_N, len(batch)).to(torch.float32)
        _, entropy_B = weighted_cross_entropy(model.predictions(batch), batch.labels_N, rows_NB)
        found_R[batch.index_B.cpu()] -= entropy_B.double().cpu()
    return found_R


def margins(policy_R: Tensor, start_R: Tensor, beta: float) -> Tensor:
    """m_i of every pair, [P]."""
    gain_P2 = (policy_R - start_R).view(-1, 2)
    return beta * (gain_P2[:, 0] - gain_P2[:, 1])


def preference_step(
    student: Forward,
    at_start: Callable[[], AbstractContextManager[None]],
    pairs: Sequence[Batch],
    alignment: Sequence[Batch] = (),
    distillation: Distillation | None = None,
    dpo: Dpo = Dpo(),
    all_reduce: AllReduce = single_rank,
) -> GuidedTerms:
    """Accumulate the gradient of one step: L on the pairs + alpha * KL on the alignment rows (`core.guided`).

    `at_start` puts the weights at the start into the student for a while. The terms' `task` is L, and their accuracy
    the share of pairs whose chosen answer gained more than the rejected one.
    """
    distillation = distillation or Distillation()
    answers = 2 * dpo.most_pairs
    here_R, tokens_R = torch.zeros(answers, dtype=torch.float64), torch.zeros(answers, dtype=torch.float64)
    for batch in pairs:
        if batch.labelled:
            counts_B = torch.bincount(batch.row_N, minlength=len(batch)).double().cpu()
            here_R[batch.index_B.cpu()], tokens_R[batch.index_B.cpu()] = 1.0, counts_B
    policy_R = answer_log_probabilities(student, pairs, answers)
    with at_start():
        start_R = answer_log_probabilities(student, pairs, answers)
    policy_R, start_R, tokens_R = all_reduce(torch.stack([policy_R, start_R, tokens_R])).unbind()
    # Both answers may have been cut to nothing by the longest row.
    whole_P = tokens_R.view(-1, 2).min(1).values > 0
    count = max(int(whole_P.sum()), 1)
    chosen_tokens = max(float(tokens_R[::2].sum()), 1.0)
    margin_P = margins(policy_R, start_R, dpo.beta)
    pull_P = whole_P * dpo.beta * torch.sigmoid(-margin_P) / count
    weight_R = torch.stack([pull_P + dpo.sft_weight / chosen_tokens, -pull_P], dim=1).flatten()
    for batch in pairs:
        weight_N = weight_R[batch.index_B.cpu()].to(batch.ids_BT.device, torch.float32)[batch.row_N]
        weighted_cross_entropy(student.predictions(batch), batch.labels_N, weight_N[:, None])[0].backward()
    kept = guided_step(student, (), alignment, distillation, all_reduce)
    mine_P = here_R[::2] * whole_P
    liked = (policy_R * here_R)[::2].sum() / chosen_tokens
    loss = (-F.logsigmoid(margin_P) * mine_P).sum() / count - dpo.sft_weight * liked
    task = loss.to(kept.distill.device)
    tokens = int(tokens_R.sum())
    right = ((margin_P > 0) * mine_P).sum() * tokens / count
    total = task + distillation.alpha * kept.distill
    return GuidedTerms(task, kept.distill, total, tokens, kept.alignment_tokens, right.to(task.device))
