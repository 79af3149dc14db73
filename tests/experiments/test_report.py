"""The quickstart's table in a terminal."""

from __future__ import annotations

import io

from rich.console import Console

from reft_ray.experiments.report import COLUMNS, table_of


def test_the_table_fits_80_columns_with_the_longest_figures() -> None:
    row = dict.fromkeys(COLUMNS, 100.0) | {"intervals": {key: [91.2, 100.0] for key in COLUMNS}}
    row |= {f"{label}_{name}": 100 for label in ("harmful", "harmless") for name in ("rows", "dropped")}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table_of({"aligned_sft": row | {"seconds": 1234.5}}))
    shown = console.export_text()
    assert "1234" in shown
    assert "…" not in shown
