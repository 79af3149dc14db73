"""The weights of a run with the lowest validation loss, and when it is time to stop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from reft_ray.finetuning.config import FinetuneConfig


@dataclass(slots=True)
class BestState:
    """What a checkpoint keeps: the lowest validation loss and its step, and how many checkpoints were not lower."""

    loss: float | None = None
    step: int = 0
    stale: int = 0


@dataclass(slots=True)
class BestWeights:
    """The best trainable weights so far, on the CPU; empty before the first measurement and with `select=last`."""

    config: FinetuneConfig
    state: BestState
    weights: dict[str, Tensor] = field(default_factory=dict)

    def update(self, loss: float, step: int, weights: Mapping[str, Tensor]) -> None:
        """Take a checkpoint's validation loss, and its weights if it is the lowest; NaN never is."""
        if self.config.select == "last" and self.config.patience is None:
            return
        if loss < (math.inf if self.state.loss is None else self.state.loss):
            self.state.loss, self.state.step, self.state.stale = loss, step, 0
            if self.config.select == "best":
                self.weights = dict(weights)
        else:
            self.state.stale += 1

    @property
    def exhausted(self) -> bool:
        """Whether `patience` checkpoints in a row were not better."""
        return self.config.patience is not None and self.state.stale >= self.config.patience

    def chosen(self, last: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The weights to export: the best ones, or those at the end."""
        return self.weights or last
