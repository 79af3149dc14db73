"""Pictures of the dashboards' main panels, from a running Prometheus or from a demo of the built-in service.

    python benchmarks/dashboard_pictures.py [--prometheus http://127.0.0.1:9090 --minutes 15] [--out docs/pictures]

Draws the queries of the Grafana dashboards with their units and thresholds, one PNG per dashboard. Without an address
the whole service is started and used for some minutes: see `watched_service.py`.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from itertools import cycle, product
from pathlib import Path
from typing import Any

import httpx
import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, PercentFormatter
from watched_service import use, watched_service

from reft_ray.telemetry.dashboards import BOARDS
from reft_ray.telemetry.panel import Board, Chart, DisplayUnit, Panel

MAIN = {
    "filter": (
        "Rows by decision",
        "Rows not allowed, by reason",
        "Refusal scores",
        "Request time",
        "Latency breakdown",
        "Canary prompts",
    ),
    "screening": ("Rows by outcome", "Screenings ended, last day", "Findings, last day", "Time per dataset"),
    "review": ("Quarantine", "Decisions, last day"),
    "jobs": ("Jobs by status", "Transitions, last day"),
    "finetuning": ("Loss terms", "KL from teacher to student", "Tokens", "Step time"),
    "chat": ("Time to first token", "Inter-token latency", "Chat tokens", "Completions by outcome"),
    "data": ("Object store", "Network"),
    "safety": ("Harmful score", "Over-refusal", "Finetune accuracy", "Gate results, last day"),
    "service": ("Requests by route", "Errors by code", "Request time", "CPU and memory"),
}
COLORS = ("#2f6f9f", "#d1782d", "#4b8f5c", "#b0475a", "#7d6ba8", "#8c6d52", "#5b8f95", "#a3a12e")
STYLES = ("-", ":", "-.")
WARN, BAD = "#d1a02d", "#c23b3b"
Series = tuple[dict[str, str], np.ndarray, np.ndarray]


class Range:
    """Range queries over the last minutes."""

    def __init__(self, url: str, minutes: float, end: float) -> None:
        self._url = url.rstrip("/") + "/api/v1/query_range"
        self._start, self._end, self._step = end - 60 * minutes, end, max(1.0, minutes / 4)

    def series(self, expr: str) -> list[Series]:
        """Labels, minutes before the end, and values."""
        for name in ("cluster", "application", "teacher", "project"):
            expr = expr.replace(f"${name}", ".*")
        params = {
            "query": expr.replace("$__rate_interval", "1m"),
            "start": str(self._start),
            "end": str(self._end),
            "step": str(self._step),
        }
        answer = httpx.post(self._url, data=params, timeout=60).json()
        if answer["status"] != "success":
            raise SystemExit(f"error: Prometheus refuses {expr}: {answer['error']}")
        return [(found["metric"], *self._values(found["values"])) for found in answer["data"]["result"]]

    def _values(self, pairs: list[list[Any]]) -> tuple[np.ndarray, np.ndarray]:
        stamps, values = zip(*pairs, strict=True)
        return (np.array(stamps, dtype=float) - self._end) / 60, np.array(values, dtype=float)


def draw(board: Board, source: Range, path: Path) -> None:
    """One board's main panels as a PNG."""
    panels = {panel.title: panel for panel in board.panels}
    chosen = [panels[title] for title in MAIN[board.name]]
    lines = math.ceil(len(chosen) / 2)
    figure, axes = plt.subplots(lines, 2, figsize=(13, 3.3 * lines), layout="constrained", squeeze=False)
    figure.suptitle(board.title, x=0.01, ha="left", fontsize=15, fontweight="bold")
    for axis in axes.flat[len(chosen) :]:
        axis.set_visible(False)
    for panel, axis in zip(chosen, axes.flat, strict=False):
        axis.set_title(panel.title, loc="left", fontsize=10)
        (heat_map if panel.chart is Chart.HEATMAP else time_series)(panel, source, axis)
        axis.set_xlabel("minutes", fontsize=8)
        axis.tick_params(labelsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def time_series(panel: Panel, source: Range, axis: Axes) -> None:
    """Lines with their legend, and the thresholds near the values."""
    drawn = [(line, *found) for line in panel.lines for found in source.series(line.expr)]
    drawn.sort(key=lambda item: -np.nan_to_num(item[3]).max())
    for (style, color), (line, labels, minutes, values) in zip(cycle(product(STYLES, COLORS)), drawn, strict=False):
        axis.plot(minutes, values, color=color, linestyle=style, linewidth=1.6, label=_legend(line.legend, labels))
    if not drawn:
        axis.text(0.5, 0.5, "no data", transform=axis.transAxes, ha="center", color="grey")
        return
    top = max(float(np.nan_to_num(values).max()) for *_, values in drawn)
    for bound, color in ((panel.thresholds.warn, WARN), (panel.thresholds.bad, BAD)):
        if bound is not None and bound <= 1.5 * top:
            axis.axhline(bound, color=color, linestyle="--", linewidth=0.9)
    low, high = axis.get_ylim()
    low = min(0.0, low)
    axis.set_ylim(low, high + 0.3 * (high - low))
    axis.grid(axis="y", color="0.92")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, frameon=False, loc="upper left", ncols=1 + (len(drawn) - 1) // 4)
    _unit(panel.unit, axis)


def heat_map(panel: Panel, source: Range, axis: Axes) -> None:
    """Rates per bucket over time, from the cumulative buckets of a histogram."""
    found = {float(labels["le"]): (minutes, values) for labels, minutes, values in source.series(panel.lines[0].expr)}
    bounds = sorted(bound for bound in found if math.isfinite(bound))
    if not bounds:
        axis.text(0.5, 0.5, "no data", transform=axis.transAxes, ha="center", color="grey")
        return
    minutes = max((found[bound][0] for bound in bounds), key=len)
    cumulative = np.array([np.interp(minutes, *found[bound]) for bound in bounds])
    rates = np.diff(cumulative, axis=0, prepend=0.0).clip(min=0.0)
    mesh = axis.pcolormesh(minutes, bounds, rates, shading="nearest", cmap="magma_r")
    axis.figure.colorbar(mesh, ax=axis, label="rows/s")


def _legend(template: str, labels: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), template) or "value"


def _unit(shown: DisplayUnit, axis: Axes) -> None:
    if shown is DisplayUnit.SHARE:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif shown is DisplayUnit.SECONDS:
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} s"))
    elif shown is not DisplayUnit.NUMBER:
        axis.set_ylabel(
            {DisplayUnit.ROWS_PER_SECOND: "rows/s", DisplayUnit.BYTES: "bytes"}.get(shown, "per second"), fontsize=8
        )


def draw_boards(prometheus: str, minutes: float, out: Path, only: list[str] | None) -> None:
    """Draw every board, or some."""
    source = Range(prometheus, minutes, time.time())
    for board in BOARDS:
        # Accelerators have no picture: the demo has none.
        if board.name in (only or MAIN):
            path = out / f"dashboard-{board.name}.png"
            draw(board, source, path)
            print(path)


def main() -> None:
    """Draw from a running Prometheus, or start the service first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prometheus", help="address of a running Prometheus")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    parser.add_argument("--minutes", type=float, default=15, help="how far to look back in a running Prometheus")
    parser.add_argument("--board", choices=list(MAIN), action="append", help="only these")
    args = parser.parse_args()
    if args.prometheus:
        draw_boards(args.prometheus, args.minutes, args.out, args.board)
        return
    with watched_service() as (service, prometheus):
        started = time.monotonic()
        use(service)
        # Ray's agents export metrics every ten seconds.
        time.sleep(15)
        draw_boards(prometheus, (time.monotonic() - started) / 60, args.out, args.board)


if __name__ == "__main__":
    main()
