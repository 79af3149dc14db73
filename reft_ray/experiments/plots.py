"""Plots: refusal scores with their thresholds, harmful score against accuracy, and costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

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
    save(figure, path)


def plot_methods(methods: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """HS against FA, one point per method with its 95 % intervals; lower right is best."""
    figure, axes = plt.subplots(figsize=(5.6, 4.2))
    for index, (name, row) in enumerate(methods.items()):
        x, y = row["finetune_accuracy"], row["harmful_score"]
        x_low, x_high = row["intervals"]["finetune_accuracy"]
        y_low, y_high = row["intervals"]["harmful_score"]
        # An interval of proportions need not contain a point at exactly 0 or 100.
        x_error = [[max(0, x - x_low)], [max(0, x_high - x)]]
        y_error = [[max(0, y - y_low)], [max(0, y_high - y)]]
        axes.errorbar(x, y, xerr=x_error, yerr=y_error, fmt="o", color=f"C{index}", capsize=3, label=name)
    axes.set(xlabel="finetune accuracy, %", ylabel="harmful score, %", ylim=(-4, 104))
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25)
    save(figure, path)


def new_figure(*args: Any, **options: Any) -> Any:
    """(figure, axes), drawn without a display."""
    return plt.subplots(*args, **options)


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG and free it."""
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_grid(ratios: Mapping[float, Sequence[tuple[str, bool, float, float]]], path: Path) -> None:
    """HS against FA, a panel per harmful ratio; points are (method, filtered, FA, HS).

    A line connects each method without the filter (hollow) and with it (filled).
    """
    figure, panels = plt.subplots(1, len(ratios), figsize=(4.2 * len(ratios), 4.6), squeeze=False, sharey=True)
    names = list(dict.fromkeys(name for points in ratios.values() for name, _, _, _ in points))
    colours = {name: plt.get_cmap("tab20")(index % 20) for index, name in enumerate(names)}
    for axes, (ratio, points) in zip(panels[0], ratios.items(), strict=True):
        unfiltered = {name: (fa, hs) for name, filtered, fa, hs in points if not filtered}
        with_filter = {name: (fa, hs) for name, filtered, fa, hs in points if filtered}
        for name in unfiltered.keys() & with_filter.keys():
            line = zip(unfiltered[name], with_filter[name], strict=True)
            axes.plot(*line, color=colours[name], linewidth=0.8, alpha=0.6)
        for found, fill in ((unfiltered, "none"), (with_filter, None)):
            for name, (fa, hs) in found.items():
                axes.plot(fa, hs, "o", color=colours[name], markerfacecolor=fill or colours[name], markersize=7)
        axes.set(title=f"harmful ratio {ratio:g}", xlabel="finetune accuracy, %", ylim=(-4, 104))
        axes.grid(alpha=0.25)
    panels[0][0].set_ylabel("harmful score, %")
    handles = [Line2D([], [], color=colour, marker="o", linestyle="") for colour in colours.values()]
    figure.legend(handles, names, frameon=False, fontsize=7, ncol=5, loc="lower center")
    figure.tight_layout(rect=(0, 0.04 + 0.04 * ((len(names) + 4) // 5), 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_costs(ratios: Mapping[str, tuple[float, float]], path: Path) -> None:
    """Bars of time and operations relative to plain finetuning, by method."""
    figure, axes = plt.subplots(figsize=(7, 0.45 * len(ratios) + 1.2))
    positions = range(len(ratios))
    for offset, (label, column) in enumerate((("time", 0), ("operations", 1))):
        axes.barh(
            [position + 0.38 * offset for position in positions],
            [both[column] for both in ratios.values()],
            0.36,
            label=label,
        )
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks([position + 0.19 for position in positions], list(ratios), fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="relative to plain LoRA finetuning")
    axes.legend(frameon=False, fontsize=8)
    save(figure, path)
