"""Lisa: alternate between alignment rows and the user's rows, each state pulled towards the last weights of the other.

    state alignment, K1 steps:  min_w  L_alignment(w) + rho/2 ||w - w_user||^2
    state user,      K2 steps:  min_w  L_user(w)      + rho/2 ||w - w_alignment||^2

w_user and w_alignment are the last weights of either state. As in the released code, the pull begins after a tenth of
the run.

Source: Huang et al., "Lisa: Lazy Safety Alignment for Large Language Models against Harmful Fine-tuning Attack",
arXiv 2405.18641; github.com/git-disl/Lisa (K1/K2 = 100/900, rho 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from reft_ray.baselines.step import Step, Streams
from reft_ray.core.batch import Batch
from reft_ray.core.forward import AllReduce, single_rank
from reft_ray.core.guided import GuidedTerms


class Lisa(Step):
    """`step` computes the loss of either stream; `parameters` are the trained ones by name."""

    def __init__(
        self,
        step: Step,
        parameters: Mapping[str, nn.Parameter],
        alignment_steps: int,
        user_steps: int,
        rho: float,
        pull_after: int = 0,
        all_reduce: AllReduce = single_rank,
    ) -> None:
        self.step = step
        self.parameters = parameters
        self.alignment_steps, self.user_steps = alignment_steps, user_steps
        self.rho, self.pull_after = rho, pull_after
        self.all_reduce = all_reduce
        self.done = 0
        self.anchors = {aligning: self._weights() for aligning in (False, True)}

    @property
    def aligning(self) -> bool:
        """Whether the next step learns alignment rows."""
        return self.done % (self.alignment_steps + self.user_steps) < self.alignment_steps

    @property
    def streams(self) -> Streams:
        """Rows of the current state alone."""
        return Streams(user=not self.aligning, alignment=self.aligning)

    def __call__(self, user: Sequence[Batch], alignment: Sequence[Batch]) -> GuidedTerms:
        """One step of the current state."""
        aligning = self.aligning
        before = self.done - 1
        if self.done and aligning != (before % (self.alignment_steps + self.user_steps) < self.alignment_steps):
            self.anchors[not aligning] = self._weights()
        terms = self.step(() if aligning else user, alignment if aligning else ())
        if self.done > self.pull_after:
            terms = replace(terms, total=terms.total + self._pull(self.anchors[not aligning]))
        self.done += 1
        return terms

    def _pull(self, anchor: Mapping[str, Tensor]) -> Tensor:
        """Add this rank's share of the gradient of the proximal term, and return its share of the value."""
        ranks = self.all_reduce(torch.ones(1)).item()
        gaps = [parameter.detach() - anchor[name] for name, parameter in self.parameters.items()]
        for parameter, gap in zip(self.parameters.values(), gaps, strict=True):
            pull = gap * (self.rho / ranks)
            parameter.grad = pull if parameter.grad is None else parameter.grad + pull
        return self.rho / 2 / ranks * torch.stack([gap.double().square().sum() for gap in gaps]).sum()

    def _weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def state(self) -> dict[str, Tensor]:
        """Steps done, and the last weights of both states."""
        kept = {"done": torch.tensor(self.done)}
        for aligning, anchor in self.anchors.items():
            kept |= {f"{int(aligning)}/{name}": tensor.clone() for name, tensor in anchor.items()}
        return kept

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue in the same state of the alternation."""
        self.done = int(state["done"])
        for aligning in (False, True):
            self.anchors[aligning] = {
                name: state[f"{int(aligning)}/{name}"].to(parameter.device)
                for name, parameter in self.parameters.items()
            }
