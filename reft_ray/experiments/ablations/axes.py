"""The settings that are varied, one at a time, from the comparison's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Variation:
    """One setting with a different value; `changes` are configuration keys."""

    axis: str
    value: str
    changes: Mapping[str, Any]


def teacher_axes(layers: int) -> list[Variation]:
    """Stage 1: the features and their distance from the base's; REG's weight and layer; updates of R_l."""
    found = [_one("feature", "feature", "trained")]
    found += [Variation("feature", "base", {"feature": "base", "feature_mix": None})]
    found += [_one("share of the adapter", "feature_mix", value) for value in (0.125, 0.25, 0.5, 1.0)]
    found += [_one("lambda", "separation_weight", value) for value in (0.0, 0.1, 0.5, 1.0, 2.0)]
    low, high = max(1, round(0.25 * layers)), max(1, round(0.85 * layers))
    found += [_one("layer of REG", "layer", layer) for layer in range(low, high + 1)]
    found += [_one("refresh every n steps", "refresh_every", value) for value in (1, 10, 50)]
    return found + [_one("decay of the class means", "feature_decay", value) for value in (0.0, 0.95, 0.99)]


def student_axes() -> list[Variation]:
    """Stage 2: the weight, softness and number of alignment labels; the initial weights."""
    found = [_one("alpha", "distill_weight", value) for value in (0.1, 0.3, 1.0, 3.0)]
    found += [_one("T", "temperature", value) for value in (0.5, 1.0, 2.0, 4.0)]
    found += [_one("top-k", "topk", value) for value in (1, 4, 16, 64)]
    found += [_one("alignment tokens : user tokens", "alignment_ratio", value) for value in (0.25, 0.5, 1.0, 2.0)]
    found += [_one("labels", "labels", value) for value in ("soft", "hard")]
    return found + [_one("start", "init", value) for value in ("base", "aligned")]


def _one(axis: str, key: str, value: Any) -> Variation:
    return Variation(axis, f"{value:g}" if isinstance(value, float) else str(value), {key: value})
