"""Small charts as SVG geometry, drawn on the server; templates have the marks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 600, 140


@dataclass(frozen=True, slots=True)
class Bar:
    """A histogram's bar with its range of scores."""

    x: float
    width: float
    height: float
    count: int
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Curve:
    """A line as SVG points, with its last value."""

    name: str
    points: str
    last: float


def histogram(counts: Sequence[int]) -> list[Bar]:
    """Bars of counts over [-1, 1] on a square-root scale, on which a few rows next to thousands are visible."""
    peak, width = max([1, *counts]), WIDTH / max(1, len(counts))
    return [
        Bar(
            x=round(index * width + width / 15, 2),
            width=round(width * 13 / 15, 2),
            height=round((HEIGHT - 20) * (count / peak) ** 0.5, 1),
            count=count,
            low=2 * index / len(counts) - 1,
            high=2 * (index + 1) / len(counts) - 1,
        )
        for index, count in enumerate(counts)
    ]


def at(score: float) -> float:
    """The x of a score in [-1, 1]."""
    return round((min(1.0, max(-1.0, score)) + 1) / 2 * WIDTH, 1)


def above(counts: Sequence[int], threshold: float) -> int:
    """Rows of a histogram above a threshold; the bar that it cuts counts in proportion."""
    total = 0.0
    for bar in histogram(counts):
        share = min(1.0, max(0.0, (bar.high - threshold) / (bar.high - bar.low)))
        total += bar.count * share
    return round(total)


def curves(series: Mapping[str, Sequence[tuple[float, float]]], top: float | None = None) -> list[Curve]:
    """Lines over a common x axis from their first to their last x; y from 0 to `top`, or to the highest value."""
    points = [point for values in series.values() for point in values]
    if not points:
        return []
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    peak = top or max(1e-9, *(y for _, y in points))
    span = (last - first) or 1.0

    def place(x: float, y: float) -> str:
        return f"{(x - first) / span * WIDTH:.1f},{HEIGHT - min(1.0, max(0.0, y / peak)) * (HEIGHT - 10):.1f}"

    return [
        Curve(name, " ".join(place(x, y) for x, y in values), values[-1][1])
        for name, values in series.items()
        if values
    ]
