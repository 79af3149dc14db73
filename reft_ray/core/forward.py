"""What the method needs from outside: a model, and a sum over data-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from reft_ray.core.batch import Batch

AllReduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all data-parallel ranks and returns it; the identity with a single rank."""


def single_rank(tensor: Tensor) -> Tensor:
    """The AllReduce of a run with one rank."""
    return tensor


@dataclass(frozen=True, slots=True)
class Predictions:
    """Logits [N, V] that are not computed yet: the LM head's input [N, D], and the head.

    The logits of an 8B model on 8,192 positions take 2 GB and their loss several times that, so that losses call the
    head on some positions at a time. `weights` are the head's trained parameters.
    """

    hidden_ND: Tensor
    head: Callable[[Tensor], Tensor]
    vocabulary: int
    weights: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, found: Tensor | Predictions) -> Predictions:
        """Logits [N, V] that are there already; predictions as they are."""
        return found if isinstance(found, Predictions) else cls(found, _same, found.shape[-1])

    def logits(self, where: slice = slice(None)) -> Tensor:
        """The logits of some positions, [n, V]."""
        return self.head(self.hidden_ND[where])

    def __len__(self) -> int:
        return len(self.hidden_ND)


def _same(tensor: Tensor) -> Tensor:
    return tensor


class Forward(Protocol):
    """A model's forward pass. Shapes: B rows, N labelled positions of the batch, D width, V vocabulary."""

    def predictions(self, batch: Batch) -> Predictions:
        """Logits at the positions whose next token is learned, [N, V], row by row, computed where they are needed."""
        ...

    def features(self, batch: Batch, layer: int) -> Tensor:
        """Hidden states of the last prompt tokens after decoder layer `layer`, [B, D]; later layers are not run."""
        ...

    def predictions_and_features(self, batch: Batch, layer: int) -> tuple[Predictions, Tensor]:
        """Both, from one pass."""
        ...
