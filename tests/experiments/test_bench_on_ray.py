"""Cells as Ray tasks, through the command: the same figures as in one process."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from reft_ray.cli.main import app

TINY = [
    'builtin_sizes={"teacher_train":80,"teacher_validation":40,"alignment":40,"hs_prompts":6,"over_refusal_prompts":6,'
    '"task_test":6}',
    'recipe={"rows":200,"shape":{"hidden":32,"layers":2,"heads":2,"intermediate":64}}',
    "teacher_settings.epochs=1",
    "student.epochs=1",
    "alignment_rows=20",
    "evaluation.max_new_tokens=3",
    "alignment_stage.epochs=1",
    'blocks=[{"methods":["sft","distill","vaccine"],"tasks":["sentiment"],"harmful_ratios":[0.25],"sizes":[16],'
    '"filters":[true]}]',
]


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
def test_cells_run_as_tasks_and_give_what_they_give_in_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFT_CACHE", str(tmp_path / "cache"))
    settings = [word for setting in TINY for word in ("--set", setting)]
    figures = []
    for workers in ("2", "0"):
        out = tmp_path / f"out-{workers}"
        command = ["bench", "run", "--out", str(out), "--workers", workers, "--section", "grid", *settings]
        found = CliRunner().invoke(app, command)
        assert found.exit_code == 0, found.output
        # A filter that drops nothing makes the cell without it, too.
        cells = sorted((out / "cells").glob("*-filter-*.json"))
        assert len(cells) == 3
        assert len(list(out.glob("vaccine-*"))) == 1
        assert not list(out.glob(".*.runs"))
        results = [json.loads(cell.read_text())["result"] for cell in cells]
        figures.append([(cell["harmful_score"], cell["intervals"], cell["dropped"]) for cell in results])
    assert figures[0] == figures[1]
    report = tmp_path / "docs" / "results.md"
    command = ["bench", "table", "--out", str(tmp_path / "out-2"), "--markdown", str(report), *settings]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0, found.output
    assert "not computed yet:" in found.output
    assert "### sentiment, n = 16" in report.read_text()
