"""What the method asks of a model: logits where they are learned, and the feature of the prompt's end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from reft_ray.core.batch import Batch


@dataclass(frozen=True, slots=True)
class Output:
    """`logits_NV` at the batch's trained positions; `feature_BD` at `prompt_end` after decoder layer l."""

    logits_NV: Tensor | None = None
    feature_BD: Tensor | None = None


class Forward(Protocol):
    """A model at work. Without `logits` it stops after the layer that was asked for."""

    def __call__(self, batch: Batch, *, logits: bool = True, layer: int | None = None) -> Output:
        """Logits where the batch is trained, and the feature after `layer`, as far as they are asked for."""
        ...
