"""The refusal feature and the refusal score (arXiv 2506.07356, section on refusal features).

    R_l  = mean over harmful prompts f_l(x) - mean over harmless prompts f_l(x)
    s(x) = cos(f_l(x), R_l)

Shape suffixes: B rows, T tokens, D width, 2 the classes (0 harmless, 1 harmful).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

AllReduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all data-parallel ranks and returns it; the identity where there is one rank."""


def single_rank(tensor: Tensor) -> Tensor:
    """The AllReduce of a run with one rank."""
    return tensor


def prompt_feature(hidden_BTD: Tensor, prompt_end_B: Tensor) -> Tensor:
    """f_l: the hidden state at each row's last prompt token, [B, D]."""
    return hidden_BTD[torch.arange(hidden_BTD.shape[0], device=hidden_BTD.device), prompt_end_B]


def refusal_score(feature_BD: Tensor, refusal_D: Tensor) -> Tensor:
    """s(x): cosine to the refusal feature, in float32 whatever the model computes in; [B] in [-1, 1]."""
    return F.cosine_similarity(feature_BD.float(), refusal_D.float(), dim=-1)


class ClassSums:
    """Feature sums and counts per class, in float64 so that their order does not matter."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        # One tensor, [2, D + 1], so that a refresh costs a single all-reduce; the last column counts.
        self._sums = torch.zeros(2, width + 1, dtype=torch.float64, device=device)

    def add(self, feature_BD: Tensor, label_B: Tensor) -> None:
        """Add the features of labelled rows; rows with another label than 0 or 1 are left out."""
        for label in (0, 1):
            chosen = feature_BD.detach()[label_B == label].double()
            self._sums[label, :-1] += chosen.sum(0)
            self._sums[label, -1] += chosen.shape[0]

    def reduce(self, all_reduce: AllReduce) -> ClassSums:
        """Sum over ranks, in place."""
        self._sums = all_reduce(self._sums)
        return self

    @property
    def counts(self) -> tuple[int, int]:
        """Rows seen: harmless, harmful."""
        return int(self._sums[0, -1]), int(self._sums[1, -1])

    def mean(self, label: int) -> Tensor | None:
        """The class mean [D] in float32, or None before the first row of that class."""
        count = self._sums[label, -1]
        return (self._sums[label, :-1] / count).float() if count > 0 else None

    def refusal(self) -> Tensor:
        """R_l, [D] in float32. Raises ValueError unless both classes were seen."""
        harmless, harmful = self.mean(0), self.mean(1)
        if harmless is None or harmful is None:
            raise ValueError(f"a refusal feature needs rows of both classes, got (harmless, harmful) = {self.counts}")
        return harmful - harmless


class RunningRefusal:
    """R_l while the teacher learns: exponential moving averages of the class means, detached."""

    def __init__(self, decay: float = 0.95) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.means: list[Tensor | None] = [None, None]

    def update(self, sums: ClassSums) -> None:
        """Move towards the means of one step; a class absent from the step keeps its mean."""
        for label in (0, 1):
            new = sums.mean(label)
            old = self.means[label]
            if new is not None:
                self.means[label] = new if old is None else torch.lerp(new, old, self.decay)

    @property
    def refusal_D(self) -> Tensor | None:
        """The current R_l, or None until both classes were seen."""
        harmless, harmful = self.means
        return None if harmless is None or harmful is None else harmful - harmless

    def state_dict(self) -> dict[str, Tensor]:
        """The running means, for a checkpoint."""
        return {str(label): mean for label, mean in enumerate(self.means) if mean is not None}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the running means."""
        self.means = [state.get("0"), state.get("1")]
