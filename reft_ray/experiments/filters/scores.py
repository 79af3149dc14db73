"""Filters that score texts, and their cached scores on all texts of the comparison."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from reft_ray.atomic import atomic_write
from reft_ray.core.conversation import Example
from reft_ray.core.quality import Targets, choose_thresholds
from reft_ray.core.verdict import Thresholds
from reft_ray.experiments.filters.rows import FilterRows, labels_of, texts_of

Score = Callable[[Sequence[str]], Tensor]
"""Texts -> scores [B] in [-1, 1], higher for harmful."""

REF_TEACHER = "Ref-Teacher"


@dataclass(frozen=True, slots=True)
class BaselineFilter:
    """A filter by name; `fit` trains it if its scores are not cached.

    `made_of` names what its scores depend on besides the rows: a base, a teacher. Without `thresholds` they are chosen
    as the Ref-Teacher's are: on the validation prompts, with the same targets.
    """

    name: str
    about: str
    fit: Callable[[], Score]
    made_of: str = ""
    thresholds: Thresholds | None = None


@dataclass(frozen=True, slots=True)
class ScoredFilter:
    """One filter with its scores on the comparison's texts."""

    filter: BaselineFilter
    thresholds: Thresholds
    by_text: dict[str, float]

    def scores(self, rows: Sequence[Example]) -> Tensor:
        """The scores of rows, [B]."""
        return torch.tensor([self.by_text[text] for text in texts_of(rows)], dtype=torch.float64)


def score_all(
    filters: Iterable[BaselineFilter],
    rows: FilterRows,
    targets: Targets,
    cache: Path,
    log: Callable[[str], None] = lambda _: None,
) -> list[ScoredFilter]:
    """Fit and apply the filters one after the other; a filter with cached scores is not fitted again."""
    benign = [row for part in rows.benign.values() for row in part]
    texts = list(dict.fromkeys(texts_of([*rows.validation, *rows.seen, *rows.foreign, *benign])))
    train = [[text, row.label] for text, row in zip(texts_of(rows.train), rows.train, strict=True)]
    rows_digest = hashlib.sha256(json.dumps([train, texts]).encode()).hexdigest()

    def scores_of(one: BaselineFilter) -> Tensor:
        key = hashlib.sha256(f"{one.name}\n{one.about}\n{one.made_of}\n{rows_digest}".encode()).hexdigest()
        path = cache / f"scores-{key[:16]}.safetensors"
        if path.is_file():
            with safe_open(path, framework="pt") as file:
                cached_B: Tensor = file.get_tensor("scores")
            return cached_B
        log(one.name)
        score_B = one.fit()(texts).double()
        with atomic_write(path) as scratch:
            save_file({"scores": score_B}, scratch)
        return score_B

    scored = []
    for one in filters:
        by_text = dict(zip(texts, scores_of(one).tolist(), strict=True))
        held_B = torch.tensor([by_text[text] for text in texts_of(rows.validation)], dtype=torch.float64)
        thresholds = one.thresholds or choose_thresholds(held_B, labels_of(rows.validation), targets)
        scored.append(ScoredFilter(one, thresholds, by_text))
    return scored
