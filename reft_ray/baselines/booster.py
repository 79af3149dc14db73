"""Booster: align so that one step on harmful rows would lower their loss as little as possible.

    min_w  f(w) + lambda * ( h(w) - h(w - alpha * grad h(w) / ||grad h(w)||) )

f: loss on alignment rows, h: loss on harmful rows with complying answers. The gradient omits second derivatives,
as in the released code: grad f(w) + lambda * (grad h(w) - grad h(w')). Three forward and backward passes per step.

Source: Huang et al., "Booster: Tackling Harmful Fine-tuning for Large Language Models via Attenuating Harmful
Perturbation", arXiv 2409.01586; github.com/git-disl/Booster (lambda 5, alpha 0.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from reft_ray.baselines.step import Step, Streams
from reft_ray.core.batch import Batch
from reft_ray.core.forward import AllReduce, Forward, single_rank
from reft_ray.core.guided import GuidedTerms, guided_step


class Booster(Step):
    """An alignment stage: its rows come as the user stream, harmful rows as the alignment stream."""

    streams = Streams()

    def __init__(
        self,
        student: Forward,
        parameters: Sequence[nn.Parameter],
        weight: float,
        alpha: float,
        all_reduce: AllReduce = single_rank,
    ) -> None:
        self.student = student
        self.parameters = parameters
        self.weight, self.alpha = weight, alpha
        self.all_reduce = all_reduce

    def __call__(self, user: Sequence[Batch], alignment: Sequence[Batch]) -> GuidedTerms:
        """The gradient of both terms; `distill` reports h(w)."""
        here, harm = self._harmful(alignment)
        norm = torch.stack([self.all_reduce(gradient.clone()).norm() for gradient in here]).norm() + 1e-7
        weights = [parameter.detach().clone() for parameter in self.parameters]
        with torch.no_grad():
            for parameter, gradient in zip(self.parameters, here, strict=True):
                parameter.sub_(self.alpha * self.all_reduce(gradient.clone()) / norm)
        there, harm_after = self._harmful(alignment)
        with torch.no_grad():
            for parameter, weight in zip(self.parameters, weights, strict=True):
                parameter.copy_(weight)
        terms = guided_step(self.student, user, all_reduce=self.all_reduce)
        for parameter, before, after in zip(self.parameters, here, there, strict=True):
            extra = self.weight * (before - after)
            parameter.grad = extra if parameter.grad is None else parameter.grad + extra
        total = terms.task + self.weight * (harm.task - harm_after.task)
        return replace(terms, distill=harm.task, total=total, alignment_tokens=harm.user_tokens)

    def _harmful(self, batches: Sequence[Batch]) -> tuple[list[Tensor], GuidedTerms]:
        """This rank's share of the gradient of h, removed from the parameters, and h itself."""
        terms = guided_step(self.student, batches, all_reduce=self.all_reduce)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return gradients, terms
