"""Ablations and gradient conflict end to end on a small comparison."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest

from reft_ray.experiments.ablations import conflict, conflict_render, render, section
from reft_ray.experiments.ablations.axes import student_axes, teacher_axes
from reft_ray.experiments.ablations.section import SECTION, AblationSettings, thinned
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


def test_every_value_is_a_row_and_the_usual_one_is_marked(result: dict) -> None:
    tables = result["tables"]
    assert [row["value"] for row in tables["teacher"]] == ["trained", "base"]
    assert [row["value"] for row in tables["teacher"] if row["default"]] == ["trained"]
    assert [row["value"] for row in tables["student"] if row["default"]] == ["soft"]
    assert [row["value"] for row in tables["tau"] if row["default"]] == ["block"]
    assert list(tables["teacher"][0]["by_layer"]) == ["1", "2", "3", "4"]


def test_a_higher_threshold_drops_no_more_rows(result: dict) -> None:
    by_tau = sorted(result["tables"]["tau"], key=lambda row: row["tau"])
    dropped = [sum(row["dropped"].values()) for row in by_tau]
    assert dropped == sorted(dropped, reverse=True)
    assert dropped[-1] == 0
    assert [row["rows"] + drop for row, drop in zip(by_tau, dropped, strict=True)] == [16] * 5


def test_what_was_made_is_gathered(small_workspace: Workspace, result: dict) -> None:
    assert SECTION.gather is not None
    assert SECTION.gather(small_workspace, SETTINGS) == result
    part = SECTION.gather(small_workspace, {**SETTINGS, "only": ["labels"]})
    assert part["tables"] == {"student": result["tables"]["student"]}


def test_the_report_shows_every_row_and_says_where_intervals_overlap(result: dict, tmp_path: Path) -> None:
    text = render.render(result, tmp_path)
    for rows in result["tables"].values():
        for row in rows:
            if row["axis"] != "tau":
                assert f"| {row['axis']} | {'**' if row['default'] else ''}{row['value']}" in text
    told = copy.deepcopy(result)
    for row, auroc in zip(told["tables"]["teacher"], (0.5, 0.9), strict=True):
        row["auroc"] = [auroc, auroc - 0.02, auroc + 0.02]
    assert "feature: from 0.500 (trained) to 0.900 (base); the intervals of these two do not overlap." in render.render(
        told, tmp_path
    )


def measure(n: int) -> dict:
    return {"value": 50.0, "interval": [40.0, 60.0], "n": n}


def test_the_report_says_how_many_prompts_there_were_not_how_many_were_wanted(tmp_path: Path) -> None:
    figures = {"harmful_score": measure(40), "over_refusal": measure(75), "finetune_accuracy": measure(50)}
    row = {"axis": "T", "value": "1", "default": True, "gate": {"passed": True}, **figures}
    settings = {"rows": 200, "harmful_ratio": 0.3, "evaluated": 100}
    text = render.render({"tables": {"student": [row]}, "settings": settings}, tmp_path)
    assert "40 harmful, 25 harmless and 50 task prompts. Brackets" in text


@pytest.mark.parametrize(("mix", "marked"), [(0.25, ["0.25"]), (1.0, ["1"]), (0.0, [])])
def test_the_share_of_the_adapter_that_is_marked_is_the_teachers_own(
    small_workspace: Workspace, monkeypatch: pytest.MonkeyPatch, mix: float, marked: list[str]
) -> None:
    teacher = small_workspace.teacher
    monkeypatch.setattr(teacher, "manifest", replace(teacher.manifest, feature_mix=mix))
    # Rows are made of cells when they are asked for; nothing is trained here.
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
    # The same start on the same batches: only rows and labels differ.
    text = conflict_render.render(result, tmp_path)
    assert (tmp_path / "conflict.png").is_file()
    assert text.count("\n| base |") == text.count("\n| aligned |") == 4
    del result["runs"][1]["points"][1]
    for table in (text, conflict_render.render(result, tmp_path)):
        assert {line.count("|") for line in table.splitlines() if line.startswith("|")} == {8}
    for one in result["runs"]:
        for point in one["points"]:
            point["cosine"] = [0.3 if one["labels"] == "soft" else -0.2, -0.3, 0.4]
    claimed = conflict_render.render(result, tmp_path)
    assert (
        "Soft labels conflict less than hard ones: holds here (4 of 4 pairings; mean difference of the cosine +0.500)"
        in claimed
    )
    assert "Removing the harmful rows lessens the conflict: does not hold here (0 of 4" in claimed
