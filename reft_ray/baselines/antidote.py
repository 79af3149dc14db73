"""Antidote: after finetuning, remove the weights that matter most on harmful rows.

    score_ij = |U_ij| * ||X_j||_2       U: what finetuning changed, X: the layer's inputs on harmful rows
    U_ij <- 0  for the share `dense` of largest scores in each row i

One forward pass over harmful rows, no training.

Source: Huang et al., "Antidote: Post-fine-tuning Safety Alignment for Large Language Models against Harmful
Fine-tuning", arXiv 2408.09600; github.com/git-disl/Antidote (Wanda scores, dense 0.1, 2,000 harmful rows). The released
code prunes the two factors of the finetuning adapter; here it is their product, so that the adapter's start counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def antidote(update_OI: Tensor, input_norm_I: Tensor, dense: float) -> Tensor:
    """The update of one layer without the share `dense` of each row that scores highest."""
    pruned = round(update_OI.shape[1] * dense)
    if pruned == 0:
        return update_OI.clone()
    columns = (update_OI.abs() * input_norm_I).topk(pruned, dim=1).indices
    return update_OI.scatter(1, columns, 0.0)


@contextmanager
def input_norms(layers: Mapping[str, nn.Linear]) -> Iterator[dict[str, Tensor]]:
    """Record the inputs of linear layers; at the end the mapping has ||X_j||_2 of every input feature, by layer."""
    sums: dict[str, Tensor] = {}
    norms: dict[str, Tensor] = {}

    def watch(name: str) -> nn.Module | object:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            squares_I = args[0].detach().float().flatten(0, -2).square().sum(0)
            sums[name] = sums.get(name, torch.zeros_like(squares_I)) + squares_I

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]  # type: ignore[arg-type]
    try:
        yield norms
    finally:
        for handle in handles:
            handle.remove()
        norms |= {name: squares_I.sqrt() for name, squares_I in sums.items()}
