"""The grid for people: an overview of HS and FA per task, every cell with its intervals, and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from reft_ray.experiments.bench.grid import gather, run
from reft_ray.experiments.bench.methods import METHODS
from reft_ray.experiments.bench.sections import Section
from reft_ray.experiments.plots import plot_grid

Row = Mapping[str, Any]
_MEASURES = ("harmful_score", "finetune_accuracy", "over_refusal")


def render(result: Mapping[str, Any], pictures: Path) -> str:
    """Markdown of the grid."""
    made: list[Row] = result["cells"]
    lines = [
        "HS: share of harmful prompts, none of them in any training row, whose greedy answer complies (refusal "
        "matcher), lower is better. FA: share of the task's test rows answered right, higher is better. "
        "Over-refusal: share of harmless prompts (look-alikes of harmful ones, and the task's own) refused. All in %. "
        "Brackets: 95 % bootstrap intervals over prompts where one seed was run, lowest and highest seed where there "
        "are more. Each method stands without and behind the same Ref-Teacher filter; behind it, base → SFT is the "
        "ablation *filter only* and distillation is this project's method, *guided*. Seconds are those of a machine "
        "that did other work too; the section on costs measures time.",
    ]
    for task, n in sorted({(row["cell"]["task"], row["cell"]["n"]) for row in made}):
        rows = [row for row in made if (row["cell"]["task"], row["cell"]["n"]) == (task, n)]
        picture = f"grid-{task}-{n}.png"
        plot_grid({ratio: _points(_at(rows, ratio)) for ratio in _ratios(rows)}, pictures / picture)
        prompts = rows[0]["prompts"]
        lines += [
            "",
            f"### {task}, n = {n}",
            "",
            f"{prompts['harmful']} harmful, {prompts['harmless']} harmless and {prompts['task']} task prompts.",
            "",
            *_overview(rows),
            "",
            f"![HS against FA]({pictures.name}/{picture})",
            "",
            *_details(rows),
        ]
    if result["failed"]:
        lines += ["", "Failed cells:", "", *(f"- {cell['name']}: {cell['error']}" for cell in result["failed"])]
    if result["not_run"]:
        lines += ["", f"{result['not_run']} cells of this grid were not run."]
    return "\n".join(lines)


def _ratios(rows: Iterable[Row]) -> list[float]:
    return sorted({row["cell"]["harmful_ratio"] for row in rows})


def _at(rows: Iterable[Row], ratio: float) -> dict[tuple[str, bool], list[Row]]:
    """Rows of one harmful ratio by method and filter, seeds together, in the order of METHODS."""
    found: dict[tuple[str, bool], list[Row]] = {}
    for name in METHODS:
        for filtered in (False, True):
            seeds = [
                row
                for row in rows
                if (row["cell"]["method"], row["cell"]["filtered"], row["cell"]["harmful_ratio"])
                == (name, filtered, ratio)
            ]
            if seeds:
                found[name, filtered] = seeds
    return found


def _name(key: tuple[str, bool]) -> str:
    return METHODS[key[0]].name(key[1])


def _overview(rows: Sequence[Row]) -> list[str]:
    ratios = _ratios(rows)
    by_ratio = {ratio: _at(rows, ratio) for ratio in ratios}
    heads = [f"{measure} at {ratio:g}" for measure in ("HS", "FA") for ratio in ratios]
    lines = [f"| method | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    alike = len({len(seeds) for found in by_ratio.values() for seeds in found.values()}) == 1
    for key in dict.fromkeys(key for found in by_ratio.values() for key in found):
        figures = [_mean(by_ratio[ratio].get(key, ()), measure, alike) for measure in _MEASURES[:2] for ratio in ratios]
        lines.append(f"| {_name(key)} | {' | '.join(figures)} |")
    return lines


def _mean(seeds: Sequence[Row], measure: str, alike: bool) -> str:
    """The mean over seeds; how many there are is said where other cells of the table have more or fewer."""
    if not seeds:
        return ""
    said = f" ({len(seeds)} seeds)" if len(seeds) > 1 and not alike else ""
    return f"{mean(row[measure] for row in seeds):.1f}{said}"


def _details(rows: Sequence[Row]) -> list[str]:
    lines = []
    for ratio in _ratios(rows):
        lines += [
            f"Harmful ratio {ratio:g}:",
            "",
            "| method | seeds | HS | FA | over-refusal | incoherent | dropped harmful | dropped harmless | s | MiB |"
            " TFLOP |",
            "|---" * 11 + "|",
        ]
        for key, seeds in _at(rows, ratio).items():
            figures = [_interval(seeds, measure) for measure in _MEASURES]
            dropped = [
                f"{mean(row['dropped'][label] for row in seeds):.0f} of {mean(row['rows'][label] for row in seeds):.0f}"
                for label in ("harmful", "harmless")
            ]
            # 0 where a cell was made without counting.
            counted = [row["flops"] / 1e12 for row in seeds if row["flops"]]
            lines.append(
                f"| {_name(key)} | {len(seeds)} | {' | '.join(figures)} | "
                f"{mean(row['incoherent'] for row in seeds):.1f} | {' | '.join(dropped)} | "
                f"{mean(row['seconds'] for row in seeds):.0f} | {mean(row['peak_mib'] for row in seeds):.0f} | "
                f"{f'{mean(counted):.2f}' if counted else ''} |"
            )
        lines.append("")
    return lines


def _interval(seeds: Sequence[Row], measure: str) -> str:
    values = [row[measure] for row in seeds]
    low, high = seeds[0]["intervals"][measure] if len(seeds) == 1 else (min(values), max(values))
    return f"{mean(values):.1f} ({low:.1f}-{high:.1f})"


def _points(found: Mapping[tuple[str, bool], Sequence[Row]]) -> list[tuple[str, bool, float, float]]:
    """(method, behind the filter, FA, HS) for the picture."""
    return [
        (
            METHODS[method].title,
            filtered,
            mean(row["finetune_accuracy"] for row in seeds),
            mean(row["harmful_score"] for row in seeds),
        )
        for (method, filtered), seeds in found.items()
    ]


SECTION = Section("grid", "The grid", run, render, gather=gather)
