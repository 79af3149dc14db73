"""Gradient conflict as Markdown and a picture; the sentences compare what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reft_ray.experiments.plots import new_figure, save


def render(result: Mapping[str, Any], pictures: Path) -> str:
    """A table of all runs, the claim's comparisons, and the cosine along training."""
    runs, settings = result["runs"], result["settings"]
    _plot(runs, pictures / "conflict.png")
    longest = max((one["points"] for one in runs), key=len)
    progress = [point["progress"] for point in longest]
    lines = [
        "Cosine between the gradients of the task loss and of the alignment loss, over the student's trained "
        "parameters: "
        f"mean of {settings['pairs']} pairs of batches of {settings['batch_rows']} rows, at the start and at "
        "checkpoints near the given shares of the "
        "student's own training. Negative: a step for one undoes the other. The training rows are "
        f"{settings['rows']} with {100 * settings['harmful_ratio']:.0f} % harmful ones, or the harmless among them.",
        "",
        f"| start | labels | harmful rows | {' | '.join(f'{100 * at:.0f} %' for at in progress)} | mean after "
        "the start |",
        f"|{'---|' * (len(progress) + 4)}",
    ]
    for one in runs:
        cells = [_cosine(point["cosine"]) for point in one["points"]]
        # A run of fewer steps has fewer checkpoints in between; the last column is the end of all.
        cells[-1:-1] = [""] * (len(progress) - len(cells))
        lines.append(
            f"| {one['init']} | {one['labels']} | {'in' if one['poisoned'] else 'removed'} | {' | '.join(cells)} |"
            f" {_mean(one):+.3f} |"
        )
    lines += ["", *_claims(runs), "", f"![Gradient conflict]({pictures.name}/conflict.png)"]
    return "\n".join(lines)


def _cosine(values: Sequence[float]) -> str:
    value, low, high = values
    return f"{value:+.3f} ({low:+.3f}-{high:+.3f})"


def _mean(one: Mapping[str, Any]) -> float:
    points = one["points"][1:]
    return sum(float(point["cosine"][0]) for point in points) / len(points)


def _claims(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each claim of the method as a comparison of means, with the number of pairings that agree with it."""
    claims = (
        ("labels", "soft", "hard", "Soft labels conflict less than hard ones"),
        ("poisoned", False, True, "Removing the harmful rows lessens the conflict"),
        ("init", "base", "aligned", "The base start conflicts less than the aligned one"),
    )
    lines = ["The method's claims, each over the pairings that differ in nothing else:", ""]
    for key, better, worse, claim in claims:
        others = [name for name in ("init", "labels", "poisoned") if name != key]
        by_rest: dict[tuple[Any, ...], dict[Any, float]] = {}
        for one in runs:
            by_rest.setdefault(tuple(one[name] for name in others), {})[one[key]] = _mean(one)
        gains = [pair[better] - pair[worse] for pair in by_rest.values() if better in pair and worse in pair]
        holds = sum(gain > 0 for gain in gains)
        verdict = "holds" if holds == len(gains) else "does not hold" if holds == 0 else "holds in part"
        lines.append(
            f"- {claim}: {verdict} here ({holds} of {len(gains)} pairings; mean difference of the cosine "
            f"{sum(gains) / len(gains):+.3f})."
        )
    return lines


def _plot(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    figure, panels = new_figure(1, 2, figsize=(9.6, 3.6), sharey=True)
    for axes, poisoned in zip(panels, (True, False), strict=True):
        for one in runs:
            if one["poisoned"] != poisoned:
                continue
            x = [point["progress"] for point in one["points"]]
            y, low, high = zip(*(point["cosine"] for point in one["points"]), strict=True)
            style = {"hard": "--", "soft": "-"}[one["labels"]]
            colour = {"base": "#3b7dd8", "aligned": "#d1495b"}[one["init"]]
            axes.plot(x, y, style, color=colour, marker="o", ms=3, label=f"{one['init']}, {one['labels']}")
            axes.fill_between(x, low, high, color=colour, alpha=0.12)
        axes.axhline(0, color="grey", lw=0.8)
        axes.set(title=f"harmful rows {'in' if poisoned else 'removed'}", xlabel="share of training done")
    panels[0].set_ylabel("cosine of task and alignment gradient")
    panels[0].legend(frameon=False, fontsize=8)
    save(figure, path)
