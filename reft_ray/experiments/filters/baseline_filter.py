"""What stands in the Ref-Teacher's place: anything that gives texts a score, higher for harmful."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from reft_ray.core.verdict import Thresholds

Score = Callable[[Sequence[str]], Tensor]
"""Texts -> scores [B] in [-1, 1]."""

REF_TEACHER = "Ref-Teacher"


@dataclass(frozen=True, slots=True)
class BaselineFilter:
    """A filter by name. `fit` learns it when its scores are not known yet.

    `made_of` names what its scores depend on besides the rows: a base, a teacher. Without `thresholds` of its own it
    gets them as the Ref-Teacher does: from the validation prompts, by the same targets.
    """

    name: str
    about: str
    fit: Callable[[], Score]
    made_of: str = ""
    thresholds: Thresholds | None = None
