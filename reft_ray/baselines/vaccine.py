"""Vaccine: align under the worst small perturbation of the hidden embeddings, so that later drift undoes less.

    eps_l = rho * grad_{e_l} L / || (grad_{e_1} L, ..., grad_{e_n} L) ||        e_l: output of attention block l
    min_w  L(w; e_1 + eps_1, ..., e_n + eps_n)

Two forward and backward passes per step. The norm is taken over one micro-batch, as in the released code, so this
gradient does depend on how a step is split.

Source: Huang et al., "Vaccine: Perturbation-aware Alignment for Large Language Model against Harmful Fine-tuning",
arXiv 2402.01109; github.com/git-disl/Vaccine (rho 2).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from reft_ray.baselines.step import Step, Streams
from reft_ray.core.batch import Batch
from reft_ray.core.forward import AllReduce, Forward, single_rank
from reft_ray.core.guided import GuidedTerms
from reft_ray.core.losses import cross_entropy_sum, label_counts, terms_sum


class Vaccine(Step):
    """An alignment stage: its rows come as the user stream. `blocks` are the modules whose outputs are perturbed."""

    streams = Streams(alignment=False)

    def __init__(
        self, student: Forward, blocks: Sequence[nn.Module], rho: float, all_reduce: AllReduce = single_rank
    ) -> None:
        self.student = student
        self.blocks = blocks
        self.rho = rho
        self.all_reduce = all_reduce

    def __call__(self, user: Sequence[Batch], alignment: Sequence[Batch]) -> GuidedTerms:
        """The gradient at the perturbed embeddings."""
        (tokens,) = label_counts(user, all_reduce=self.all_reduce)
        losses = [torch.zeros(())]
        for batch in user:
            with captured(self.blocks) as embeddings:
                loss = cross_entropy_sum(self.student.predictions(batch), batch.labels_N)
                # Under gradient checkpointing the blocks run again in here, and their outputs need gradients as before.
                gradients = torch.autograd.grad(loss, list(embeddings))
            with shifted(self.blocks, perturbation(gradients, self.rho)):
                loss = cross_entropy_sum(self.student.predictions(batch), batch.labels_N) / tokens
                # In here for the same reason: they must be shifted as before.
                loss.backward()
            losses.append(loss.detach())
        task = terms_sum(losses)
        return GuidedTerms(task, torch.zeros_like(task), task, tokens, 0)


def perturbation(gradients: Sequence[Tensor], rho: float) -> list[Tensor]:
    """Gradients scaled to a joint norm of rho."""
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    return [gradient * (rho / (norm + 1e-7)) for gradient in gradients]


def _first(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@contextmanager
def captured(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect the blocks' outputs in the order in which they run, with gradients also below all trained weights."""
    outputs: list[Tensor] = []

    def collect(_module: nn.Module, _args: Any, output: Any) -> None:
        outputs.append(_first(output).requires_grad_(True))

    handles = [block.register_forward_hook(collect) for block in blocks]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def shifted(blocks: Sequence[nn.Module], shifts: Sequence[Tensor]) -> Iterator[None]:
    """Add a constant to each block's output; gradients pass as if nothing was added."""

    def adder(shift: Tensor) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            moved = _first(output) + shift
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        return hook

    handles = [block.register_forward_hook(adder(shift)) for block, shift in zip(blocks, shifts, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
