"""The quickstart's report: `report.json`, `report.html`, and the table for the terminal."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from reft_ray.atomic import atomic_write
from reft_ray.html import templates_of

COLUMNS = ("harmful_score", "finetune_accuracy", "everyday_refused", "look_alikes_refused")


def write_report(report: Mapping[str, Any], summary: str, out: Path) -> None:
    """Write `report.json` and a self-contained `report.html`; the two plots must already be in `out`."""
    template = templates_of("reft_ray.experiments").get_template("report.html")
    pictures = {
        f"{name}_png": base64.b64encode((out / f"{name}.png").read_bytes()).decode() for name in ("scores", "methods")
    }
    with atomic_write(out / "report.html") as scratch:
        scratch.write_text(template.render(**report, **pictures, summary=summary, columns=COLUMNS), encoding="utf-8")
    with atomic_write(out / "report.json") as scratch:
        scratch.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def table_of(methods: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row per method, in %, with 95 % intervals below the figures; fits 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for header in ("method", "HS", "FA", "everyday\nrefused", "look-\nalikes"):
        table.add_column(header, no_wrap=True)
    for header in ("harmful\ndropped", "harmless\ndropped", "s"):
        table.add_column(header, justify="right", no_wrap=True)
    for name, row in methods.items():
        figures = [
            f"{row[key]:.1f}\n[dim]{row['intervals'][key][0]:.0f}-{row['intervals'][key][1]:.0f}[/]" for key in COLUMNS
        ]
        table.add_row(
            name,
            *figures,
            f"{row['harmful_dropped']}\nof {row['harmful_rows']}",
            f"{row['harmless_dropped']}\nof {row['harmless_rows']}",
            f"{row['seconds']:.0f}",
        )
    return table
