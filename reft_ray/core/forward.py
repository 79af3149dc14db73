"""What the method needs from outside: a model, and a sum over data-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from reft_ray.core.batch import Batch

AllReduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all data-parallel ranks and returns it; the identity with a single rank."""


def single_rank(tensor: Tensor) -> Tensor:
    """The AllReduce of a run with one rank."""
    return tensor


class Forward(Protocol):
    """A model's forward pass. Shapes: B rows, N labelled positions of the batch, D width, V vocabulary."""

    def logits(self, batch: Batch) -> Tensor:
        """Logits at the positions whose next token is learned, [N, V], row by row."""
        ...

    def features(self, batch: Batch, layer: int) -> Tensor:
        """Hidden states of the last prompt tokens after decoder layer `layer`, [B, D]; later layers are not run."""
        ...

    def logits_and_features(self, batch: Batch, layer: int) -> tuple[Tensor, Tensor]:
        """Both, from one pass."""
        ...
