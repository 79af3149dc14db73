"""The filter comparison as Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reft_ray.experiments.filters.figures import FOREIGN, FOREIGN_UNRELATED, SEEN
from reft_ray.experiments.filters.plots import plot_histograms, plot_roc
from reft_ray.experiments.markdown import bold_best, interval, table

_SHOWN_PAIRS = 6
_TITLES = {
    FOREIGN: "Sources that no filter has seen",
    FOREIGN_UNRELATED: "The same without sources that share their origin with training rows",
    SEEN: "Unseen rows of the training sources",
}


def render(result: Mapping[str, Any], pictures: Path) -> str:
    """Markdown and two pictures."""
    plot_roc(result, pictures / "filters-roc.png")
    plot_histograms(result, pictures / "filters-scores.png")
    lines = [*_setup(result), ""]
    for name, part in result["parts"].items():
        lines += [f"### {_TITLES[name]}", "", *_part(part), ""]
    lines += ["### Source by source: AUROC", "", *_sources(result), ""]
    lines += ["### Harmless tasks: prompts above the block threshold, %", "", *_benign(result), ""]
    lines += ["### Pairs of sources that cost the most AUROC", "", *_lost_pairs(result), ""]
    lines += [f"![ROC, unseen sources]({pictures.name}/filters-roc.png)"]
    lines += [f"![Scores, unseen sources]({pictures.name}/filters-scores.png)"]
    return "\n".join(lines)


def _setup(result: Mapping[str, Any]) -> list[str]:
    block = result["targets"]["block"]
    target = f"recall {100 * block['recall']:.3g} %" if block["fpr"] is None else f"FPR {100 * block['fpr']:.3g} %"
    head = ("training prompts", "block threshold by validation prompts", "validation AUROC, Ref-Teacher")
    return [
        *table(head, [(result["training_rows"], target, f"{result['validation_auroc']:.3f}")]),
        "",
        *table(("filter", "description"), ((one["name"], one["about"]) for one in result["filters"])),
    ]


def _part(part: Mapping[str, Any]) -> list[str]:
    """The difference of AUROC to the first filter is measured on the same resamples."""
    named = part["filters"]
    aurocs = bold_best([row["auroc"][0] for row in named.values()], [interval(row["auroc"]) for row in named.values()])
    first = next(iter(named))
    head = ("filter", "AUROC", f"minus {first}", "AUPRC", "recall at 1 % FPR", "recall at block", "FPR at block")
    rows = (
        (
            name,
            auroc,
            "" if name == first else interval(row["over_first"], "+.3f"),
            f"{row['auprc']:.3f}",
            f"{row['recall_at_1_fpr']:.3f}",
            _share(row["recall"]),
            _share(row["fpr"]),
        )
        for auroc, (name, row) in zip(aurocs, named.items(), strict=True)
    )
    counts = table(("prompts", "harmful"), [(part["rows"], part["harmful"])])
    return [*counts, "", *table(head, rows), "", "Brackets: 95 % bootstrap intervals over prompts."]


def _share(value: float | None, missing: str = "") -> str:
    return missing if value is None else f"{value:.3f}"


def _sources(result: Mapping[str, Any]) -> list[str]:
    """A source with one label is ranked against all rows of the other label in its part."""
    names = [one["name"] for one in result["filters"]]
    rows = []
    for part, sources in result["sources"].items():
        for source, row in sources.items():
            values = [row["filters"][name]["auroc"][0] for name in names]
            first = row["filters"][names[0]]
            mark = " (training source)" if part == SEEN else " (sibling)" if source in result["siblings"] else ""
            rows.append(
                (
                    f"{source}{mark}",
                    row["rows"],
                    row["harmful"],
                    *bold_best(values, [f"{value:.3f}" for value in values]),
                    f"{_share(first['recall'], '-')} / {_share(first['fpr'], '-')}",
                )
            )
    return table(("source", "rows", "harmful", *names, f"recall / FPR at block, {names[0]}"), rows)


def _benign(result: Mapping[str, Any]) -> list[str]:
    names = [one["name"] for one in result["filters"]]
    rows = []
    for task, row in result["benign"].items():
        cells = (row["filters"][name] for name in names)
        rows.append((task, row["rows"], *(interval([cell["value"], *cell["interval"]], ".1f") for cell in cells)))
    return table(("prompts", "n", *names), rows)


def _lost_pairs(result: Mapping[str, Any]) -> list[str]:
    """1 - AUROC as a sum over pairs of sources, for the first filter and the best of the others."""
    first = result["filters"][0]["name"]
    part = result["parts"][FOREIGN]["filters"]
    best = max((name for name in part if name != first), key=lambda name: part[name]["auroc"][0])
    others = {(pair["harmful"], pair["harmless"]): pair for pair in result["lost"][best]}
    rows = []
    for pair in result["lost"][first][:_SHOWN_PAIRS]:
        other = others[pair["harmful"], pair["harmless"]]
        figures = (pair["share"], pair["auroc"], pair["lost"], other["auroc"], other["lost"])
        rows.append((pair["harmful"], pair["harmless"], *(f"{value:.3f}" for value in figures)))
    total = [f"{1 - part[name]['auroc'][0]:.3f}" for name in (first, best)]
    rows.append(("all", "all", "1.000", "", total[0], "", total[1]))
    head = ("harmful", "harmless", "share of pairs", f"{first}: AUROC", "lost", f"{best}: AUROC", "lost")
    return table(head, rows)
