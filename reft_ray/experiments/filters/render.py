"""The filter table as Markdown; every sentence is chosen and filled by the figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reft_ray.experiments.filters.plots import plot_histograms, plot_roc
from reft_ray.experiments.filters.table import ALIEN, FOREIGN, SEEN

_SHOWN_PAIRS = 6
_TITLES = {
    FOREIGN: "Sources that no filter has seen",
    ALIEN: "The same without sources that share their origin with training rows",
    SEEN: "Unseen rows of the training sources",
}


def render(result: Mapping[str, Any], pictures: Path) -> str:
    """Markdown and both pictures."""
    plot_roc(result, pictures / "filters-roc.png")
    plot_histograms(result, pictures / "filters-scores.png")
    shown = (("ROC, unseen sources", "filters-roc.png"), ("Scores, unseen sources", "filters-scores.png"))
    return "\n".join([text(result), *(f"![{title}]({pictures.name}/{file})" for title, file in shown)])


def text(result: Mapping[str, Any]) -> str:
    """The Markdown without its pictures."""
    lines = [_opening(result), ""]
    for name, part in result["parts"].items():
        lines += [f"### {_TITLES[name]}", "", *_part(part), ""]
    if SEEN not in result["parts"]:
        lines += ["The teacher was trained on all rows of its training sources: none is left to measure it on.", ""]
    lines += [*_verdict(result), ""]
    lines += ["### Source by source", "", *_sources(result), ""]
    lines += ["### Harmless tasks: share of prompts above the block threshold, %", "", *_benign(result), ""]
    lines += [*_why(result), ""]
    return "\n".join(lines)


def _opening(result: Mapping[str, Any]) -> str:
    recall, fpr, _ = result["targets"]
    target = f"{100 * fpr:.3g} % false positives" if recall is None else f"a recall of {100 * recall:.3g} %"
    known = "; ".join(f"**{one['name']}**: {one['about']}" for one in result["filters"])
    return (
        f"All filters learn from the same {result['training_rows']} prompts, take layers and strengths from the same "
        f"validation prompts, and get their block threshold there by the same target ({target}). {known}. "
        "Brackets: 95 % "
        "bootstrap intervals over prompts."
    )


def _part(part: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{part['rows']} prompts, {part['harmful']} of them harmful.",
        "",
        "| filter | AUROC | AUPRC | recall at 1 % FPR | recall at block | FPR at block |",
        "|---|---|---|---|---|---|",
    ]
    best = max(row["auroc"][0] for row in part["filters"].values())
    for name, row in part["filters"].items():
        value, low, high = row["auroc"]
        shown = f"{value:.3f} ({low:.3f}-{high:.3f})"
        lines.append(
            f"| {name} | {f'**{shown}**' if value == best else shown} | {row['auprc']:.3f} | "
            f"{row['recall_at_1_fpr']:.3f}"
            f" | {_share(row['recall'])} | {_share(row['fpr'])} |"
        )
    return lines


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _verdict(result: Mapping[str, Any]) -> list[str]:
    """Which filters are ahead of the first one, behind it, or not to be told from it."""
    first = result["filters"][0]["name"]
    lines = []
    for name, part in result["parts"].items():
        groups: dict[str, list[str]] = {"is ahead of": [], "is behind": [], "cannot be told from": []}
        for other, row in part["filters"].items():
            value, low, high = row["over_first"]
            if other != first:
                verb = "is ahead of" if high < 0 else "is behind" if low > 0 else "cannot be told from"
                groups[verb].append(f"{other} ({-value:+.3f}, {-high:+.3f} to {-low:+.3f})")
        said = "; it ".join(f"{verb} {', '.join(others)}" for verb, others in groups.items() if others)
        lines.append(f"- {_TITLES[name]}: by AUROC the {first} {said}.")
    return ["The difference of AUROC on the same resamples:", "", *lines]


def _sources(result: Mapping[str, Any]) -> list[str]:
    names = [one["name"] for one in result["filters"]]
    lines = [
        f"| source | rows | harmful | {' | '.join(names)} | recall / FPR at block, {names[0]} |",
        f"|{'---|' * (len(names) + 4)}",
    ]
    for part, sources in result["sources"].items():
        for source, row in sources.items():
            cells = [row["filters"][name]["auroc"] for name in names]
            best = max(cell[0] for cell in cells)
            shown = [f"**{cell[0]:.3f}**" if cell[0] == best else f"{cell[0]:.3f}" for cell in cells]
            first = row["filters"][names[0]]
            mark = " (training source)" if part == SEEN else " (sibling)" if source in result["siblings"] else ""
            lines.append(
                f"| {source}{mark} | {row['rows']} | {row['harmful']} | {' | '.join(shown)} |"
                f" {_share(first['recall']) or '-'} / {_share(first['fpr']) or '-'} |"
            )
    return [*lines, "", "AUROC; a source of one label is ranked against all rows of the other label in its part."]


def _benign(result: Mapping[str, Any]) -> list[str]:
    names = [one["name"] for one in result["filters"]]
    lines = [f"| prompts | n | {' | '.join(names)} |", f"|{'---|' * (len(names) + 2)}"]
    for task, row in result["benign"].items():
        cells = [row["filters"][name] for name in names]
        shown = [f"{c['value']:.1f} ({c['interval'][0]:.1f}-{c['interval'][1]:.1f})" for c in cells]
        lines.append(f"| {task} | {row['rows']} | {' | '.join(shown)} |")
    return lines


def _why(result: Mapping[str, Any]) -> list[str]:
    """Where the first filter loses AUROC, and where the best other one loses less."""
    first = result["filters"][0]["name"]
    part = result["parts"][FOREIGN]["filters"]
    rivals = {name: row["auroc"][0] for name, row in part.items() if name != first}
    best = max(rivals, key=lambda name: rivals[name])
    theirs = {(pair["harmful"], pair["harmless"]): pair for pair in result["lost"][best]}
    pairs = [(pair, theirs[pair["harmful"], pair["harmless"]]) for pair in result["lost"][first]]
    lines = [
        f"### Where the {first} loses",
        "",
        f"1 - AUROC is a sum over pairs of a harmful and a harmless source. The {first} loses "
        f"{1 - part[first]['auroc'][0]:.3f} in all, the best of the others ({best}) {1 - rivals[best]:.3f}. Its "
        "largest parts:",
        "",
        f"| harmful | harmless | share of pairs | {first}: AUROC | lost | {best}: AUROC | lost |",
        "|---|---|---|---|---|---|---|",
    ]
    for pair, other in pairs[:_SHOWN_PAIRS]:
        lines.append(
            f"| {pair['harmful']} | {pair['harmless']} | {pair['share']:.3f} | {pair['auroc']:.3f} | "
            f"{pair['lost']:.3f} |"
            f" {other['auroc']:.3f} | {other['lost']:.3f} |"
        )
    shown = sum(pair["lost"] for pair, _ in pairs[:_SHOWN_PAIRS])
    lines += ["", f"These pairs make up {100 * shown / max(1e-9, 1 - part[first]['auroc'][0]):.0f} % of the loss. "]
    lines[-1] += _explained(result, first, best)
    return lines


def _explained(result: Mapping[str, Any], first: str, best: str) -> str:
    """The reasons that the figures themselves give."""
    part = result["parts"][FOREIGN]["filters"]
    said = []
    probe, direction = part.get("base probe"), part.get("base direction")
    if probe and direction:
        said.append(
            f"The untrained base's features carry {probe['auroc'][0]:.3f} under a probe and "
            f"{direction['auroc'][0]:.3f} along its own direction; training the teacher makes "
            f"{part[first]['auroc'][0]:.3f} of them."
        )
    elif probe:
        said.append(
            f"The {first} reads the untrained base's own direction here; a probe on the same base's features reaches "
            f"{probe['auroc'][0]:.3f}, so what a classifier learns there beyond the class means costs more on "
            "foreign sources than it brings."
            if probe["auroc"][0] < part[first]["auroc"][0]
            else f"The {first} reads the untrained base's own direction here; a probe on the same base's features "
            f"reaches {probe['auroc'][0]:.3f}."
        )
    if SEEN in result["parts"]:
        seen = result["parts"][SEEN]["filters"]
        said.append(
            f"On unseen rows of its training sources it reaches {seen[first]['auroc'][0]:.3f} (validation sources: "
            f"{result['validation_auroc']:.3f}), so what is lost on foreign sources is lost to the change of source."
        )
    else:
        said.append(
            f"On the validation sources it reaches {result['validation_auroc']:.3f}, so what is lost here is "
            "lost to the "
            "change of source."
        )
    if dearer := _withholds_more(result, first, best):
        said.append(f"At its own block threshold {best} withholds more of: {', '.join(dearer)}.")
    if rivals_ahead := [name for name, row in part.items() if row["over_first"][1] > 0]:
        if "MiniLM + LR" in rivals_ahead:
            said.append(
                "MiniLM brings what its own training on a billion sentence pairs taught it about meaning; the "
                "base model "
                f"here ({result['base']}) has seen far less text, and a filter on its features can know no more "
                "than they do."
            )
        if "TF-IDF + LR" in rivals_ahead:
            said.append("TF-IDF reads single words exactly, where a small model's features blur rare ones.")
    return " ".join(said)


def _withholds_more(result: Mapping[str, Any], first: str, best: str) -> list[str]:
    """Harmless tasks of which one filter withholds more than another, beyond both intervals."""
    pairs = {task: (row["filters"][best], row["filters"][first]) for task, row in result["benign"].items()}
    return [
        f"{task} ({theirs['value']:.1f} % against {ours['value']:.1f} %)"
        for task, (theirs, ours) in pairs.items()
        if theirs["interval"][0] > ours["interval"][1]
    ]
