"""Ablations and gradient conflict end to end on a small comparison."""

from dataclasses import replace
from pathlib import Path

import pytest

from reft_ray.experiments.ablations import conflict, section
from reft_ray.experiments.ablations.axes import student_axes, teacher_axes
from reft_ray.experiments.ablations.section import SECTION, AblationSettings, thinned
from reft_ray.experiments.ablations.tables import render, render_conflict
from reft_ray.experiments.bench.workspace import Workspace
from reft_ray.finetuning.config import FinetuneConfig, TeacherConfig

SETTINGS = {
    "teacher_rows": 40,
    "foreign_rows": 24,
    "rows": 16,
    "evaluated": 6,
    "only": ["feature", "labels", "tau"],
}
CONFLICT = {"rows": 20, "epochs": 1, "batch_rows": 2, "pairs": 2, "points": 2}
"""Ten steps with the harmful rows and seven without: seven do not divide by two."""


@pytest.fixture(scope="module")
def result(small_workspace: Workspace) -> dict:
    assert SECTION.gather is not None
    assert SECTION.gather(small_workspace, SETTINGS) == {}
    return SECTION.run(small_workspace, SETTINGS)


def test_every_value_is_a_row_and_the_comparisons_setting_is_marked(result: dict) -> None:
    tables = result["tables"]
    assert [row["value"] for row in tables["teacher"]] == ["trained", "base"]
    assert [row["value"] for row in tables["teacher"] if row["default"]] == ["trained"]
    assert [row["value"] for row in tables["student"] if row["default"]] == ["soft"]
    assert [row["value"] for row in tables["tau"] if row["default"]] == ["block"]
    assert list(tables["teacher"][0]["by_layer"]) == ["1", "2"]


def test_a_higher_threshold_drops_no_more_rows(result: dict) -> None:
    by_tau = sorted(result["tables"]["tau"], key=lambda row: row["tau"])
    dropped = [sum(row["dropped"].values()) for row in by_tau]
    assert dropped == sorted(dropped, reverse=True)
    assert dropped[-1] == 0
    assert [row["rows"] + drop for row, drop in zip(by_tau, dropped, strict=True)] == [16] * 5


def test_cached_rows_are_gathered(small_workspace: Workspace, result: dict) -> None:
    assert SECTION.gather is not None
    assert SECTION.gather(small_workspace, SETTINGS) == result
    part = SECTION.gather(small_workspace, {**SETTINGS, "only": ["labels"]})
    assert part["tables"] == {"student": result["tables"]["student"]}


def test_the_tables_show_every_row_with_its_interval(result: dict, tmp_path: Path) -> None:
    text = render(result, tmp_path)
    for name, rows in result["tables"].items():
        for row in rows:
            value = f"**{row['value']}**" if row["default"] else row["value"]
            assert f"| {value} |" if name == "tau" else f"| {row['axis']} | {value} |" in text
    for row in result["tables"]["teacher"]:
        value, low, high = row["auroc"]
        assert f"| {value:.3f} ({low:.3f}-{high:.3f}) |" in text
    for row in (*result["tables"]["student"], *result["tables"]["tau"]):
        low, high = row["intervals"]["harmful_score"]
        assert f"| {row['harmful_score']:.1f} ({low:.1f}-{high:.1f}) |" in text


def test_the_tables_count_the_prompts_that_were_asked(tmp_path: Path) -> None:
    measures = dict.fromkeys(("harmful_score", "over_refusal", "finetune_accuracy"), 50.0)
    figures = {
        **measures,
        "intervals": {name: [40.0, 60.0] for name in measures},
        "prompts": {"harmful": 40, "harmless": 25, "task": 50},
    }
    row = {"axis": "T", "value": "1", "default": True, "gate": {"passed": False, "failures": ["incoherent"]}, **figures}
    settings = {"rows": 200, "harmful_ratio": 0.3, "evaluated": 100}
    text = render({"tables": {"student": [row]}, "settings": settings}, tmp_path)
    assert "\n| 200 | 30 | 40 | 25 | 50 |" in text
    assert "| failed: incoherent |" in text


@pytest.mark.parametrize(("mix", "marked"), [(0.25, ["0.25"]), (1.0, ["1"]), (0.0, [])])
def test_the_marked_share_of_the_adapter_is_the_teachers(
    small_workspace: Workspace, monkeypatch: pytest.MonkeyPatch, mix: float, marked: list[str]
) -> None:
    teacher = small_workspace.teacher
    monkeypatch.setattr(teacher, "manifest", replace(teacher.manifest, feature_mix=mix))
    # Cells are trained when their rows are requested; nothing is trained here.
    cells = section._cells(small_workspace, AblationSettings(only=("share of the adapter",)))
    assert [cell.value for cell in cells if cell.default] == marked


def test_every_axis_is_a_valid_configuration() -> None:
    for variation in teacher_axes(6):
        TeacherConfig.of({"base": "base", **variation.changes})
    for variation in student_axes():
        FinetuneConfig.of({"base": "base", **variation.changes})


def test_thinning_keeps_shares() -> None:
    assert thinned(list(range(10)), 4) == [0, 3, 6, 9]
    assert thinned(list(range(3)), 8) == [0, 1, 2]


def test_conflict_is_measured_along_each_training(small_workspace: Workspace, tmp_path: Path) -> None:
    result = conflict.SECTION.run(small_workspace, CONFLICT)
    assert len(result["runs"]) == 8
    for one in result["runs"]:
        start, middle, end = (point["progress"] for point in one["points"])
        assert (start, end) == (0, 1)
        assert 0.5 <= middle < 0.6
        assert all(-1 <= point["cosine"][0] <= 1 for point in one["points"])
    text = render_conflict(result, tmp_path)
    assert (tmp_path / "conflict.png").is_file()
    assert text.count("\n| base |") == text.count("\n| aligned |") == 4
    del result["runs"][1]["points"][1]
    for table in (text, render_conflict(result, tmp_path)):
        runs = [line for line in table.splitlines() if line.startswith(("| start |", "| base |", "| aligned |"))]
        assert [line.count("|") for line in runs] == [8] * 9
    for one in result["runs"]:
        for point in one["points"]:
            point["cosine"] = [0.3 if one["labels"] == "soft" else -0.2, -0.3, 0.4]
    text = render_conflict(result, tmp_path)
    assert "\n| soft - hard labels | 4 | 4 | +0.500 |" in text
    assert "\n| harmful rows removed - in | 4 | 0 | +0.000 |" in text
