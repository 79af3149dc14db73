"""The ablations and the gradient conflict as Markdown tables; the setting of the comparison is bold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reft_ray.experiments.markdown import bold_best, gate, interval, percent, table
from reft_ray.experiments.plots import new_figure, save

Rows = Sequence[Mapping[str, Any]]
_STUDENT = ("HS %", "FA %", "over-refusal %", "gate")


def render(result: Mapping[str, Any], _pictures: Path) -> str:
    """One table per stage; brackets are 95 % intervals."""
    tables, settings = result["tables"], result["settings"]
    lines = ["**Bold**: the setting of this comparison. Brackets: 95 % intervals.", ""]
    if "teacher" in tables:
        limits = _values(settings, ("teacher_rows", "foreign_rows"))
        sizes = table(("training prompts at most", "foreign prompts at most"), [limits])
        lines += ["### Stage 1, the teacher", "", *sizes, "", *_teacher(tables["teacher"]), ""]
        lines += _layers(tables["teacher"])
    students = [*tables.get("student", ()), *tables.get("tau", ())]
    if students:
        head = ("user rows", "harmful %", "harmful prompts", "harmless prompts", "task prompts")
        counts = (settings["rows"], f"{100 * settings['harmful_ratio']:.0f}", *students[0]["prompts"].values())
        lines += ["### Stage 2, students", "", *table(head, [counts]), ""]
    if "student" in tables:
        rows = ((row["axis"], _marked(row), *_figures(row)) for row in tables["student"])
        lines += ["#### Distillation, without a filter", "", *table(("setting", "value", *_STUDENT), rows), ""]
    if "tau" in tables:
        lines += ["#### Guided, filtered at the threshold tau", "", *_thresholds(tables["tau"]), ""]
    return "\n".join(lines)


def _values(settings: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    return [settings[name] for name in names]


def _marked(row: Mapping[str, Any]) -> str:
    return f"**{row['value']}**" if row["default"] else str(row["value"])


def _teacher(rows: Rows) -> list[str]:
    head = ("setting", "value", "AUROC", "AUPRC", "recall at 1 % FPR", "validation AUROC", "chosen layer")
    numbers = ("auprc", "recall_at_1_fpr", "validation_auroc")
    return table(
        head,
        (
            (
                row["axis"],
                _marked(row),
                interval(row["auroc"]),
                *(f"{row[name]:.3f}" for name in numbers),
                row["chosen_layer"],
            )
            for row in rows
        ),
    )


def _layers(rows: Rows) -> list[str]:
    """AUROC on the foreign prompts at every layer of the same teachers."""
    shown = [row for row in rows if row["axis"] in ("layer of REG", "lambda")]
    if not shown:
        return []
    layers = list(shown[0]["by_layer"])
    lines = []
    for row in shown:
        values = [row["by_layer"][layer] for layer in layers]
        lines.append([f"{row['axis']} = {row['value']}", *bold_best(values, [f"{value:.3f}" for value in values])])
    head = ("teacher", *(f"layer {layer}" for layer in layers))
    return ["#### AUROC on foreign prompts by layer (bold: highest)", "", *table(head, lines), ""]


def _figures(row: Mapping[str, Any]) -> list[str]:
    return [*(percent(row, name) for name in ("harmful_score", "finetune_accuracy", "over_refusal")), gate(row)]


def _thresholds(rows: Rows) -> list[str]:
    return table(
        ("tau", "value", "harmful dropped", "harmless dropped", "rows left", *_STUDENT),
        (
            (_marked(row), f"{row['tau']:.3f}", *_values(row["dropped"], ("harmful", "harmless")), row["rows"],
             *_figures(row))
            for row in rows
        ),
    )  # fmt: skip


def render_conflict(result: Mapping[str, Any], pictures: Path) -> str:
    """A table of all runs, the paired differences between settings, and the cosine along training."""
    runs, settings = result["runs"], result["settings"]
    _plot(runs, pictures / "conflict.png")
    progress = [point["progress"] for point in max((one["points"] for one in runs), key=len)]
    rows = []
    for one in runs:
        cells = [interval(point["cosine"], "+.3f") for point in one["points"]]
        # A run with fewer steps has fewer checkpoints; its last one is the end of training, as for all.
        cells[-1:-1] = [""] * (len(progress) - len(cells))
        rows.append([*_case(one), *cells, f"{_mean(one):+.3f}"])
    head = ("start", "labels", "harmful rows", *(f"{100 * at:.0f} %" for at in progress), "mean after the start")
    sizes = ("pairs", "batch_rows", "rows", "harmful_ratio")
    return "\n".join(
        [
            "Cosine between the gradients of the task loss and the alignment loss, by the share of training done.",
            "",
            *table(("pairs of batches", "rows of a batch", "rows", "harmful ratio"), [_values(settings, sizes)]),
            "",
            *table(head, rows),
            "",
            *table(("difference of means", "pairs of runs", "positive", "mean"), _differences(runs)),
            "",
            f"![Gradient conflict]({pictures.name}/conflict.png)",
        ]
    )


def _case(one: Mapping[str, Any]) -> list[str]:
    return [one["init"], one["labels"], "in" if one["poisoned"] else "removed"]


def _mean(one: Mapping[str, Any]) -> float:
    points = one["points"][1:]
    return sum(float(point["cosine"][0]) for point in points) / len(points)


def _differences(runs: Rows) -> list[tuple[str, int, int, str]]:
    """For each setting: the difference of the mean cosine over pairs of runs that are otherwise equal."""
    found = []
    settings = {
        "labels": ("soft", "hard", "soft - hard labels"),
        "poisoned": (False, True, "harmful rows removed - in"),
        "init": ("base", "aligned", "base - aligned start"),
    }
    for key, (first, second, title) in settings.items():
        by_rest: dict[tuple[Any, ...], dict[Any, float]] = {}
        for one in runs:
            by_rest.setdefault(tuple(one[name] for name in settings if name != key), {})[one[key]] = _mean(one)
        gains = [pair[first] - pair[second] for pair in by_rest.values() if first in pair and second in pair]
        found.append((title, len(gains), sum(gain > 0 for gain in gains), f"{sum(gains) / len(gains):+.3f}"))
    return found


def _plot(runs: Rows, path: Path) -> None:
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
