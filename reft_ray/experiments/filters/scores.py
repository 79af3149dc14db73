"""Every filter's scores on every text of the table; a filter whose scores are on disk is not fitted again."""

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

from reft_ray.core.conversation import Example
from reft_ray.core.quality import Targets, choose_thresholds
from reft_ray.core.verdict import Thresholds
from reft_ray.experiments.filters.baseline_filter import BaselineFilter
from reft_ray.experiments.filters.linear import labels_of, texts_of
from reft_ray.experiments.filters.rows import FilterRows


@dataclass(frozen=True, slots=True)
class Scored:
    """One filter on the table's texts."""

    rival: BaselineFilter
    thresholds: Thresholds
    by_text: dict[str, float]

    def of(self, rows: Sequence[Example]) -> Tensor:
        """The scores of rows, [B]."""
        return torch.tensor([self.by_text[text] for text in texts_of(rows)], dtype=torch.float64)


def score_all(
    rivals: Iterable[BaselineFilter],
    rows: FilterRows,
    targets: Targets,
    cache: Path,
    show: Callable[[str], None] = lambda _: None,
) -> list[Scored]:
    """Fit and apply the filters, one after the other."""
    benign = [row for part in rows.benign.values() for row in part]
    texts = list(dict.fromkeys(texts_of([*rows.validation, *rows.seen, *rows.foreign, *benign])))
    learned = hashlib.sha256(
        json.dumps(
            [[[text, row.label] for text, row in zip(texts_of(rows.train), rows.train, strict=True)], texts]
        ).encode()
    ).hexdigest()
    return [_scored(rival, rows, texts, targets, cache, learned, show) for rival in rivals]


def _scored(
    rival: BaselineFilter,
    rows: FilterRows,
    texts: Sequence[str],
    targets: Targets,
    cache: Path,
    learned: str,
    show: Callable[[str], None],
) -> Scored:
    key = hashlib.sha256(f"{rival.name}\n{rival.about}\n{rival.made_of}\n{learned}".encode()).hexdigest()
    path = cache / f"scores-{key[:16]}.safetensors"
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            score_B = file.get_tensor("scores")
    else:
        show(rival.name)
        score_B = rival.fit()(texts).double()
        cache.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".writing")
        save_file({"scores": score_B}, scratch)
        scratch.rename(path)
    by_text = dict(zip(texts, score_B.tolist(), strict=True))
    held_B = torch.tensor([by_text[text] for text in texts_of(rows.validation)], dtype=torch.float64)
    thresholds = rival.thresholds or choose_thresholds(held_B, labels_of(rows.validation), targets)
    return Scored(rival, thresholds, by_text)
