"""The two pictures of a comparison: refusal scores with their thresholds, and harmful score against accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from reft_ray.core.verdict import Thresholds

HARMLESS_COLOUR, HARMFUL_COLOUR = "#3b7dd8", "#d1495b"


def plot_scores(harmless: Sequence[float], harmful: Sequence[float], limits: Thresholds, path: Path) -> None:
    """Histograms of the refusal score per label, with both thresholds."""
    figure, axes = plt.subplots(figsize=(7, 3.6))
    bins = [-1 + 0.05 * i for i in range(41)]
    axes.hist(harmless, bins, alpha=0.75, color=HARMLESS_COLOUR, label=f"harmless ({len(harmless)})")
    axes.hist(harmful, bins, alpha=0.75, color=HARMFUL_COLOUR, label=f"harmful ({len(harmful)})")
    axes.axvline(limits.review, color="black", linestyle=":", label=f"review {limits.review:.2f}")
    axes.axvline(limits.block, color="black", linestyle="--", label=f"block {limits.block:.2f}")
    axes.set(xlabel="refusal score: cosine to the refusal feature", ylabel="rows", yscale="symlog", xlim=(-1, 1))
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def plot_methods(methods: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """HS against FA, one point per method with its 95 % intervals; the good corner is the lower right one."""
    figure, axes = plt.subplots(figsize=(5.6, 4.2))
    for index, (name, row) in enumerate(methods.items()):
        x, y = row["finetune_accuracy"], row["harmful_score"]
        x_low, x_high = row["intervals"]["finetune_accuracy"]
        y_low, y_high = row["intervals"]["harmful_score"]
        # An interval of proportions need not hold a point at 0 or 100 exactly.
        x_error = [[max(0, x - x_low)], [max(0, x_high - x)]]
        y_error = [[max(0, y - y_low)], [max(0, y_high - y)]]
        axes.errorbar(x, y, xerr=x_error, yerr=y_error, fmt="o", color=f"C{index}", capsize=3, label=name)
    axes.set(xlabel="finetune accuracy, %", ylabel="harmful score, %", ylim=(-4, 104))
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
