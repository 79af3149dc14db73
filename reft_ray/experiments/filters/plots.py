"""ROC curves of all filters, and histograms of their scores on harmful and harmless rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reft_ray.experiments.plots import HARMFUL_COLOUR, HARMLESS_COLOUR, new_figure, save


def plot_roc(result: Mapping[str, Any], path: Path) -> None:
    """Recall against false-positive rate on the foreign rows: all rates, and the low ones of a usable filter."""
    figure, (whole, low) = new_figure(1, 2, figsize=(9.6, 4.2))
    for index, (name, curve) in enumerate(result["curves"].items()):
        rates, recalls = zip(*curve, strict=True)
        for axes in (whole, low):
            axes.plot(rates, recalls, color=f"C{index}", lw=2.4 if index == 0 else 1.2, label=name)
    whole.plot([0, 1], [0, 1], color="grey", lw=0.8, linestyle=":")
    whole.set(xlabel="false-positive rate", ylabel="recall of harmful prompts", xlim=(0, 1), ylim=(0, 1))
    low.set(xlabel="false-positive rate", xlim=(1e-3, 0.2), ylim=(0, 1), xscale="log")
    whole.legend(frameon=False, fontsize=7)
    save(figure, path)


def plot_histograms(result: Mapping[str, Any], path: Path) -> None:
    """Shares of each label's rows by score, with the block threshold; one panel per filter."""
    filters = result["filters"]
    columns = 2
    lines = -(-len(filters) // columns)
    figure, panels = new_figure(lines, columns, figsize=(9.6, 2.1 * lines), sharex=True, squeeze=False)
    for axes in panels.flat[len(filters) :]:
        axes.set_visible(False)
    for axes, one in zip(panels.flat, filters, strict=False):
        for label, colour in (("harmless", HARMLESS_COLOUR), ("harmful", HARMFUL_COLOUR)):
            counts = result["histograms"][one["name"]][label]
            width = 2 / len(counts)
            shares = [count / max(1, sum(counts)) for count in counts]
            axes.bar(
                [-1 + width * i for i in range(len(counts))],
                shares,
                width,
                align="edge",
                alpha=0.6,
                color=colour,
                label=label,
            )
        axes.axvline(one["block"], color="black", linestyle="--", lw=1, label="block")
        axes.set(title=one["name"], yscale="log", ylim=(1e-4, 1.5))
        axes.title.set_fontsize(9)
    panels.flat[0].legend(frameon=False, fontsize=7)
    save(figure, path)
