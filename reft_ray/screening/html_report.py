"""The report as one HTML page without scripts or external resources; row text is blurred until it is clicked."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Any

import orjson

from reft_ray.core.conversation import parts
from reft_ray.core.folding import hides
from reft_ray.html import templates_of
from reft_ray.rows.text import full_conversation
from reft_ray.screening.manifest import Manifest
from reft_ray.screening.outputs import Output
from reft_ray.screening.report import ScreenReport

PAGE = "report.html"
CHART_WIDTH = 600
WORST_ROWS = 50
SHOWN_CHARS = 1200
_COLUMNS = ("row_number", "source", "line", "decision", "reason", "part", "score", "probability", "decided_by")


def render(report: ScreenReport, output: Output, manifest: Manifest) -> bytes:
    """The page, with the withheld rows of the highest scores and the start of their text."""
    found = report.job_threshold
    counts = found.histogram if found else report.histogram
    peak, width = max([1, *counts]), CHART_WIDTH / len(counts)
    bars = [
        {
            "x": round(index * width + width / 15, 2),
            "width": round(width * 13 / 15, 2),
            "height": round(120 * count / peak, 1),
            "count": count,
            "from": 2 * index / len(counts) - 1,
        }
        for index, count in enumerate(counts)
    ]
    thresholds: dict[str, float] = dict(report.judges.get("thresholds", {}))
    if found and found.own is not None:
        thresholds["dataset"] = found.own
    marks = {name: {"score": score, "x": round((score + 1) / 2 * CHART_WIDTH, 1)} for name, score in thresholds.items()}
    template = templates_of("reft_ray.screening").get_template("report.html.jinja")
    page = template.render(report=report, bars=bars, marks=marks, worst=list(_worst(output, manifest)))
    # Names and findings have text of the dataset, too.
    return "".join(f"U+{ord(char):04X}" if hides(char) and char not in "\n\t" else char for char in page).encode()


def _worst(output: Output, manifest: Manifest) -> Iterator[dict[str, Any]]:
    """The withheld rows with the highest scores, each with the text of its highest part."""
    scored = (
        (row["score"], -row["row_number"], unit)
        for unit in manifest.units
        for row in _quarantined(output, unit, ("row_number", "score"))
    )
    chosen = heapq.nlargest(WORST_ROWS, scored)
    by_unit: dict[str, set[int]] = {}
    for _, number, unit in chosen:
        by_unit.setdefault(unit, set()).add(-number)
    rows = {
        row["row_number"]: row
        for unit, numbers in by_unit.items()
        for row in _quarantined(output, unit, (*_COLUMNS, "messages"))
        if row["row_number"] in numbers
    }
    for _, number, _ in chosen:
        row = rows[-number]
        text = _part_text(row["part"], row.pop("messages"))
        yield row | {"text": text[:SHOWN_CHARS], "cut": len(text) > SHOWN_CHARS}


def _quarantined(output: Output, unit: str, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    try:
        return list(output.table(f"quarantine/part-{unit}.parquet", columns).to_pylist())
    except FileNotFoundError:
        return []


def _part_text(name: str, messages: str) -> str:
    found = parts(full_conversation(orjson.loads(messages)))
    return "\n".join(part.text for part in found if part.name == name or not name.startswith("messages["))
