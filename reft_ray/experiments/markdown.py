"""Markdown tables of the report's sections."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a table."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return lines + [f"| {' | '.join(map(str, cells))} |" for cells in rows]


def interval(values: Sequence[float], form: str = ".3f") -> str:
    """`value (low-high)`."""
    value, low, high = values
    return f"{value:{form}} ({low:{form}}-{high:{form}})"


def percent(figures: Mapping[str, Any], measure: str) -> str:
    """One measure of a student with its interval, in %."""
    return interval([figures[measure], *figures["intervals"][measure]], ".1f")


def gate(figures: Mapping[str, Any]) -> str:
    """The release gate's result, with the measures that failed."""
    found = figures["gate"]
    return "passed" if found["passed"] else f"failed: {', '.join(found['failures'])}"


def bold_best(values: Sequence[float], texts: Sequence[str]) -> list[str]:
    """The texts, bold where the value is the highest."""
    best = max(values)
    return [f"**{text}**" if value == best else text for value, text in zip(values, texts, strict=True)]
