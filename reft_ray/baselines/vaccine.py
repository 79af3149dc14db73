"""Vaccine: align under the worst small perturbation of the hidden embeddings, so that later drift undoes less.

    eps_l = rho * grad_{e_l} L / || (grad_{e_1} L, ..., grad_{e_n} L) ||        e_l: output of attention block l
    min_w  L(w; e_1 + eps_1, ..., e_n + eps_n)

Two forward and backward passes per step. The norm is taken over one micro-batch, as in the released code, so this
gradient does depend on how a step is split.

Source: Huang et al., "Vaccine: Perturbation-aware Alignment for Large Language Model against Harmful Fine-tuning",
arXiv 2402.01109; github.com/git-disl/Vaccine (rho 2).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from reft_ray.baselines.step import Streams
from reft_ray.core.batch import Batch
from reft_ray.core.forward import Forward
from reft_ray.core.guided import GuidedTerms
from reft_ray.core.losses import cross_entropy_sum
from reft_ray.core.refusal import AllReduce, single_rank


class Vaccine:
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
        trained = sum(int(batch.trained_BT.sum()) for batch in user)
        tokens = int(self.all_reduce(torch.tensor([trained], dtype=torch.float64)))
        total = torch.zeros(1, dtype=torch.float64)
        for batch in user:
            with captured(self.blocks) as embeddings:
                loss = self._loss(batch)
            gradients = torch.autograd.grad(loss, embeddings)
            with shifted(self.blocks, perturbation(gradients, self.rho)):
                loss = self._loss(batch) / tokens
                # Under gradient checkpointing the blocks run again in here, and must be shifted as before.
                loss.backward()
            total += float(loss.detach())
        task = float(self.all_reduce(total))
        return GuidedTerms(task, 0.0, task, tokens, 0)

    def _loss(self, batch: Batch) -> Tensor:
        logits_NV = self.student(batch).logits_NV
        assert logits_NV is not None
        return cross_entropy_sum(logits_NV, batch.targets_N)

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Nothing."""


def perturbation(gradients: Sequence[Tensor], rho: float) -> list[Tensor]:
    """Gradients scaled to a joint norm of rho."""
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    return [gradient * (rho / (norm + 1e-7)) for gradient in gradients]


def _first(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@contextmanager
def captured(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect the blocks' outputs, in the order in which they run."""
    outputs: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda _m, _args, output: outputs.append(_first(output))) for block in blocks
    ]
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
