"""The grid as Markdown: HS and FA of all methods per task, every cell with its intervals, and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from reft_ray.experiments.bench.methods import METHODS
from reft_ray.experiments.markdown import interval, table
from reft_ray.experiments.plots import plot_grid

Row = Mapping[str, Any]
_MEASURES = ("harmful_score", "finetune_accuracy", "over_refusal")
_LEGEND = (
    "HS: harmful prompts answered; FA: task rows answered correctly; over-refusal: harmless prompts refused; in %. "
    "Brackets: 95 % bootstrap interval of one seed, or the lowest and the highest seed."
)


def render(result: Mapping[str, Any], pictures: Path) -> str:
    """Markdown of the grid."""
    made: list[Row] = result["cells"]
    lines = [_LEGEND]
    for task, n in sorted({(row["cell"]["task"], row["cell"]["n"]) for row in made}):
        rows = [row for row in made if (row["cell"]["task"], row["cell"]["n"]) == (task, n)]
        picture = f"grid-{task}-{n}.png"
        plot_grid({ratio: _points(_at(rows, ratio)) for ratio in _ratios(rows)}, pictures / picture)
        lines += ["", f"### {task}, n = {n}", "", *_prompts(rows[0]["prompts"]), "", *_overview(rows), ""]
        lines += [f"![HS against FA]({pictures.name}/{picture})", ""]
        for ratio in _ratios(rows):
            lines += [f"#### Harmful ratio {ratio:g}", "", *_details(_at(rows, ratio)), ""]
    if result["failed"]:
        failed = ((cell["name"], cell["error"]) for cell in result["failed"])
        lines += ["", *table(("failed cell", "error"), failed)]
    if result["not_run"]:
        lines += ["", *table(("cells not run",), [(result["not_run"],)])]
    return "\n".join(lines)


def _prompts(counts: Mapping[str, int]) -> list[str]:
    return table([f"{kind} prompts" for kind in counts], [list(counts.values())])


def _ratios(rows: Iterable[Row]) -> list[float]:
    return sorted({row["cell"]["harmful_ratio"] for row in rows})


def _at(rows: Iterable[Row], ratio: float) -> dict[tuple[str, bool], list[Row]]:
    """{(method, filtered): one row per seed} of one harmful ratio, in the order of METHODS."""
    found: dict[tuple[str, bool], list[Row]] = {(name, filtered): [] for name in METHODS for filtered in (False, True)}
    for row in rows:
        if row["cell"]["harmful_ratio"] == ratio:
            found[row["cell"]["method"], row["cell"]["filtered"]].append(row)
    return {key: seeds for key, seeds in found.items() if seeds}


def _name(key: tuple[str, bool]) -> str:
    return METHODS[key[0]].name(key[1])


def _overview(rows: Sequence[Row]) -> list[str]:
    """Means over seeds; the number of seeds is shown where it differs within the table."""
    ratios = _ratios(rows)
    by_ratio = {ratio: _at(rows, ratio) for ratio in ratios}
    same_seeds = len({len(seeds) for found in by_ratio.values() for seeds in found.values()}) == 1

    def figure(seeds: Sequence[Row], measure: str) -> str:
        if not seeds:
            return ""
        count = f" ({len(seeds)} seeds)" if len(seeds) > 1 and not same_seeds else ""
        return f"{mean(row[measure] for row in seeds):.1f}{count}"

    return table(
        ["method", *(f"{title} at {ratio:g}" for title in ("HS", "FA") for ratio in ratios)],
        (
            [_name(key), *(figure(by_ratio[r].get(key, ()), measure) for measure in _MEASURES[:2] for r in ratios)]
            for key in dict.fromkeys(key for found in by_ratio.values() for key in found)
        ),
    )


def _details(found: Mapping[tuple[str, bool], Sequence[Row]]) -> list[str]:
    head = ("method", "seeds", "HS", "FA", "over-refusal", "incoherent", "dropped harmful", "dropped harmless")
    rows = []
    for key, seeds in found.items():
        dropped = [
            f"{mean(row['dropped'][label] for row in seeds):.0f} of {mean(row['rows'][label] for row in seeds):.0f}"
            for label in ("harmful", "harmless")
        ]
        # 0 in a cell that did not count operations.
        counted = [row["flops"] / 1e12 for row in seeds if row["flops"]]
        rows.append(
            [
                _name(key),
                len(seeds),
                *(_interval(seeds, measure) for measure in _MEASURES),
                f"{mean(row['incoherent'] for row in seeds):.1f}",
                *dropped,
                f"{mean(row['seconds'] for row in seeds):.0f}",
                f"{mean(row['peak_mib'] for row in seeds):.0f}",
                f"{mean(counted):.2f}" if counted else "",
            ]
        )
    return table((*head, "s", "MiB", "TFLOP"), rows)


def _interval(seeds: Sequence[Row], measure: str) -> str:
    values = [row[measure] for row in seeds]
    bounds = seeds[0]["intervals"][measure] if len(seeds) == 1 else (min(values), max(values))
    return interval([mean(values), *bounds], ".1f")


def _points(found: Mapping[tuple[str, bool], Sequence[Row]]) -> list[tuple[str, bool, float, float]]:
    """(method, filtered, FA, HS) for the picture."""
    return [
        (METHODS[method].title, filtered, *(mean(row[measure] for row in seeds) for measure in reversed(_MEASURES[:2])))
        for (method, filtered), seeds in found.items()
    ]
