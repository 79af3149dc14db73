"""The refusal feature and the refusal score (arXiv 2506.07356, section on refusal features).

    R_l  = mean over harmful prompts f_l(x) - mean over harmless prompts f_l(x)
    s(x) = cos(f_l(x), R_l)

Shape suffixes: B rows, T tokens, D width, 2 the classes (0 harmless, 1 harmful).
"""

from __future__ import annotations

from copy import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from reft_ray.core.forward import AllReduce


def prompt_feature(hidden_BTD: Tensor, last_prompt_index_B: Tensor) -> Tensor:
    """f_l: the hidden state of each row's last prompt token, [B, D]."""
    return hidden_BTD[torch.arange(hidden_BTD.shape[0], device=hidden_BTD.device), last_prompt_index_B]


def refusal_score(feature_BD: Tensor, refusal_D: Tensor) -> Tensor:
    """s(x): cosine to the refusal feature, in float32 for a model of any dtype; [B] in [-1, 1]."""
    return F.cosine_similarity(feature_BD.float(), refusal_D.float(), dim=-1)


class ClassSums:
    """Feature sums and counts of labelled rows per class, in float64 so that their order does not matter.

    Rows with another label than 0 or 1 are ignored. `a + b` are the sums of both.
    """

    def __init__(self, feature_BD: Tensor, label_B: Tensor) -> None:
        counted_BD = F.pad(feature_BD.detach().double(), (0, 1), value=1.0)
        # One tensor, [2, D + 1], so that a refresh costs a single all-reduce; the last column counts.
        self._sums = torch.stack([counted_BD[label_B == label].sum(0) for label in (0, 1)])

    def __add__(self, other: ClassSums) -> ClassSums:
        both = copy(self)
        both._sums = self._sums + other._sums
        return both

    def reduced(self, all_reduce: AllReduce) -> ClassSums:
        """The sums over all ranks."""
        whole = copy(self)
        whole._sums = all_reduce(self._sums)
        return whole

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
        """Move towards the class means of one step; a class without a row keeps its mean."""
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
