"""The ablations as Markdown tables; the usual setting is marked, the best and worst of each axis are named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[Mapping[str, Any]]


def render(result: Mapping[str, Any], _pictures: Path) -> str:
    """One table per stage."""
    tables, settings = result["tables"], result["settings"]
    lines: list[str] = []
    if "teacher" in tables:
        lines += [
            "### Stage 1, the teacher",
            "",
            f"Short trainings (at most {settings['teacher_rows']} prompts, one pass, no early stop), measured on "
            f"{settings['foreign_rows']} or fewer prompts of foreign sources: they compare with each other "
            "only. **Bold**: the "
            "setting of this comparison.",
            "",
            *_teacher(tables["teacher"]),
            "",
            *_layers(tables["teacher"]),
            "",
        ]
    if "student" in tables:
        lines += [
            "### Stage 2, distillation",
            "",
            f"{settings['rows']} user rows, {100 * settings['harmful_ratio']:.0f} % of them harmful and none "
            "screened out, so "
            f"that distillation alone carries the student; {_asked(tables['student'][0])}. "
            "Brackets: 95 % intervals.",
            "",
            *_students(tables["student"]),
            "",
            *_extremes(tables["student"], ("harmful_score", "HS"), ("over_refusal", "over-refusal")),
            "",
        ]
    if "tau" in tables:
        lines += [
            "### The threshold",
            "",
            "The same rows behind the filter at tau; guided students of what is kept.",
            "",
        ]
        lines += [*_thresholds(tables["tau"]), ""]
    return "\n".join(lines)


def _marked(row: Mapping[str, Any]) -> str:
    return f"**{row['value']}**" if row["default"] else str(row["value"])


def _asked(row: Mapping[str, Any]) -> str:
    """How many prompts there were: fewer than asked for, where the rows hold no more."""
    harmful, refused, task = (row[name]["n"] for name in ("harmful_score", "over_refusal", "finetune_accuracy"))
    # Over-refusal counts the task's own prompts beside the others.
    return f"{harmful} harmful, {refused - task} harmless and {task} task prompts"


def _teacher(rows: Rows) -> list[str]:
    lines = [
        "| setting | value | AUROC | AUPRC | recall at 1 % FPR | validation AUROC | verdict's layer |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        value, low, high = row["auroc"]
        lines.append(
            f"| {row['axis']} | {_marked(row)} | {value:.3f} ({low:.3f}-{high:.3f}) | {row['auprc']:.3f} |"
            f" {row['recall_at_1_fpr']:.3f} | {row['validation_auroc']:.3f} | {row['chosen_layer']} |"
        )
    lines.append("")
    for axis, part in _by_axis(rows).items():
        best, worst = (pick(part, key=lambda row: row["auroc"][0]) for pick in (max, min))
        apart = best["auroc"][1] > worst["auroc"][2]
        lines.append(
            f"- {axis}: from {worst['auroc'][0]:.3f} ({worst['value']}) to {best['auroc'][0]:.3f} "
            f"({best['value']}); the intervals "
            f"of these two {'do not overlap' if apart else 'overlap'}."
        )
    return lines


def _layers(rows: Rows) -> list[str]:
    """AUROC at every layer of the same teachers: what the choice of the verdict's layer is worth."""
    shown = [row for row in rows if row["axis"] in ("layer of REG", "lambda")]
    if not shown:
        return []
    layers = list(shown[0]["by_layer"])
    lines = [
        "AUROC on the foreign prompts with the refusal feature taken at another layer of the same teacher (one "
        "and the same "
        "training per line; the layer of a verdict is chosen on validation prompts):",
        "",
        f"| teacher | {' | '.join(f'layer {layer}' for layer in layers)} |",
        f"|{'---|' * (len(layers) + 1)}",
    ]
    for row in shown:
        best = max(row["by_layer"].values())
        cells = [
            f"**{row['by_layer'][layer]:.3f}**" if row["by_layer"][layer] == best else f"{row['by_layer'][layer]:.3f}"
            for layer in layers
        ]
        lines.append(f"| {row['axis']} = {row['value']} | {' | '.join(cells)} |")
    return lines


def _students(rows: Rows) -> list[str]:
    lines = [
        "| setting | value | HS % | FA % | over-refusal % | gate |",
        "|---|---|---|---|---|---|",
    ]
    lines += [f"| {row['axis']} | {_marked(row)} | {_figures(row)} |" for row in rows]
    return lines


def _figures(row: Mapping[str, Any]) -> str:
    shares = [_share(row[name]) for name in ("harmful_score", "finetune_accuracy", "over_refusal")]
    gate = "passed" if row["gate"]["passed"] else f"failed: {', '.join(row['gate']['failures'])}"
    return " | ".join([*shares, gate])


def _share(measure: Mapping[str, Any]) -> str:
    low, high = measure["interval"]
    return f"{measure['value']:.1f} ({low:.1f}-{high:.1f})"


def _extremes(rows: Rows, *measures: tuple[str, str]) -> list[str]:
    lines = []
    for axis, part in _by_axis(rows).items():
        said = []
        for name, title in measures:
            low, high = (pick(part, key=lambda row: row[name]["value"]) for pick in (min, max))
            said.append(
                f"{title} {low[name]['value']:.1f} % ({low['value']}) to {high[name]['value']:.1f} % ({high['value']})"
            )
        lines.append(f"- {axis}: {'; '.join(said)}.")
    return lines


def _thresholds(rows: Rows) -> list[str]:
    lines = [
        "| tau | value | harmful dropped | harmless dropped | rows left | HS % | FA % | over-refusal % | gate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        dropped = row["dropped"]
        lines.append(
            f"| {_marked(row)} | {row['tau']:.3f} | {dropped['harmful']} | {dropped['harmless']} | {row['rows']} |"
            f" {_figures(row)} |"
        )
    return lines


def _by_axis(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["axis"], []).append(row)
    return {axis: part for axis, part in found.items() if len(part) > 1}
