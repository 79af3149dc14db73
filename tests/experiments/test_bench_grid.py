"""A grid of every method at a hundredth of its size: all real, cached, resumed, and one failure among the cells."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import ray
import torch

from reft_ray.core.conversation import Example, Label, chat
from reft_ray.core.errors import UsageError
from reft_ray.core.optimization import optimizer_step
from reft_ray.core.refusal import ClassSums
from reft_ray.core.teacher import TeacherTerms, teacher_step
from reft_ray.experiments import student
from reft_ray.experiments.bench import cell as cells
from reft_ray.experiments.bench import costs, grid, students
from reft_ray.experiments.bench import workspace as workspace_module
from reft_ray.experiments.bench.cell import Cell, cell_key
from reft_ray.experiments.bench.config import Block
from reft_ray.experiments.bench.defence_edits import edit_student, last_features
from reft_ray.experiments.bench.grid_tables import render
from reft_ray.experiments.bench.methods import METHODS
from reft_ray.experiments.bench.presets import preset
from reft_ray.experiments.bench.shared_models import initial_adapter, teacher_adapter
from reft_ray.experiments.bench.workspace import Workspace
from reft_ray.finetuning import student_loop, teacher_filter, teacher_loop
from reft_ray.finetuning.config import TeacherConfig
from reft_ray.finetuning.export import EXPORT, export_student
from reft_ray.hf.loading import load_base
from reft_ray.hf.lora import attach_saved, merge
from reft_ray.testbed.synthetic import write_chat_rows

TINY: dict[str, Any] = {
    "builtin_sizes": {
        "teacher_train": 80,
        "teacher_validation": 40,
        "alignment": 40,
        "hs_prompts": 6,
        "over_refusal_prompts": 6,
        "task_test": 6,
    },
    "recipe": {"rows": 200, "shape": {"hidden": 32, "layers": 2, "heads": 2, "intermediate": 64}},
    "teacher_settings": {"epochs": 1, "lora": {"rank": 4}},
    "student": {
        "epochs": 1,
        "batch_rows": 4,
        "lora": {"rank": 4},
        "baselines": {"lisa_alignment_steps": 1, "lisa_user_steps": 1},
    },
    "alignment_stage": {"epochs": 1, "lora": {"rank": 4}},
    "alignment_rows": 20,
    "count_flops": True,
    "edits": {"larf_references": 5, "antidote_rows": 4},
    "evaluation": {"max_new_tokens": 3},
    "blocks": [
        {"methods": list(METHODS), "tasks": ["sentiment"], "harmful_ratios": [0.25], "sizes": [16]},
        {
            "methods": ["larf", "distill"],
            "tasks": ["sentiment"],
            "harmful_ratios": [0.25],
            "sizes": [16],
            "filters": [True],
        },
    ],
}
CELLS = {(name, False) for name in METHODS} | {("larf", True), ("distill", True)}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFT_CACHE", str(root / "cache"))
        made = Workspace(preset("quick", TINY), root / "out")
        assert made.base
    assert made.teacher.id
    return made


@pytest.fixture(scope="module")
def result(workspace: Workspace) -> dict[str, Any]:
    return grid.run(workspace, {})


def test_every_method_gives_its_figures_with_and_without_the_filter(
    workspace: Workspace, result: dict[str, Any]
) -> None:
    assert workspace.failures == []
    assert {(row["cell"]["method"], row["cell"]["filtered"]) for row in result["cells"]} == CELLS
    for row in result["cells"]:
        for measure in ("harmful_score", "finetune_accuracy", "over_refusal"):
            low, high = row["intervals"][measure]
            assert 0 <= low <= row[measure] <= high <= 100
        assert row["rows"] == {"harmful": 4, "harmless": 12}
        if not row["cell"]["filtered"]:
            assert row["dropped"] == {"harmful": 0, "harmless": 0}
        kept = 16 - sum(row["dropped"].values())
        expected = {"safe_instruct": kept + round(0.1 * kept), "larf": kept - round(0.2 * kept)}
        assert row["trained_rows"] == expected.get(row["cell"]["method"], kept)
        assert row["seconds"] > 0
        assert row["peak_mib"] > 100
        assert row["flops"] > 1e6


def test_the_filter_is_the_same_for_all_methods(result: dict[str, Any]) -> None:
    dropped_rows = [row["dropped"] for row in result["cells"] if row["cell"]["filtered"]]
    assert all(dropped == dropped_rows[0] for dropped in dropped_rows)


def test_a_filter_that_drops_no_row_reuses_the_student_without_it(
    workspace: Workspace, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_training(*_: Any) -> Path:
        raise AssertionError("the student is cached")

    def keep_all(rows: list[Example], *_: Any, **__: Any) -> student.FilteredRows:
        return student.FilteredRows(rows, frozenset(range(len(rows))), MagicMock())

    monkeypatch.setattr(students, "filter_rows", keep_all)
    monkeypatch.setattr(student, "finetune", no_training)
    alone = next(row for row in result["cells"] if row["cell"]["method"] == "sft")
    found = cells.run_cell(workspace, Cell(**{**alone["cell"], "filtered": True}))
    assert found == {name: value for name, value in alone.items() if name != "cell"}


def test_a_second_run_trains_nothing_and_an_interrupted_one_trains_the_missing_cells(
    workspace: Workspace, result: dict[str, Any]
) -> None:
    lines: list[str] = []
    again = Workspace(workspace.config.model_copy(update={"teacher": str(workspace.teacher.folder)}), workspace.out)
    again.base = workspace.base
    again.log = lines.append
    assert grid.run(again, {}) == result
    assert lines == []
    cell = grid.cells_of(workspace.config)[0]
    workspace.path_of("cells", cell.name, cell_key(workspace, cell)).unlink()
    assert grid.gather(workspace, {})["not_run"] == 1
    made = grid.run(again, {})
    assert len(lines) == 1
    figures = ("harmful_score", "finetune_accuracy", "over_refusal", "dropped", "flops")
    for now, then in zip(made["cells"], result["cells"], strict=True):
        assert {name: now[name] for name in figures} == {name: then[name] for name in figures}


def test_a_failed_cell_is_reported_and_does_not_end_the_grid(
    workspace: Workspace, result: dict[str, Any], tmp_path: Path
) -> None:
    changes = {
        **TINY,
        "blocks": [{"methods": ["sft"], "tasks": ["sentiment"], "harmful_ratios": [1.0], "sizes": [3, 16]}],
        "student": {**TINY["student"], "max_tokens": 8},
        "teacher": str(workspace.teacher.folder),
        "base": workspace.base,
    }
    broken = Workspace(preset("quick", changes), tmp_path)
    found = grid.run(broken, {})
    assert [cell["name"] for cell in found["failed"]] == ["sentiment-1-3-s0-sft", "sentiment-1-16-s0-sft"]
    assert "ReftError" in found["failed"][0]["error"]
    assert len(broken.failures) == 2
    text = render(found, tmp_path)
    assert "| failed cell | error |" in text
    assert text.count("| sentiment-1-") == 2
    assert not list(tmp_path.glob("cells/*"))


def test_a_cell_that_ray_lost_is_reported_as_failed(
    small_workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Sent:
        remote = staticmethod(lambda *_: object())

    def lost(_: object) -> None:
        raise ray.exceptions.RayError("a traceback\nthe node is gone")

    monkeypatch.setattr(ray, "remote", lambda **_: lambda _work: Sent)
    monkeypatch.setattr(ray, "wait", lambda waiting, num_returns: (waiting[:num_returns], waiting[num_returns:]))
    monkeypatch.setattr(ray, "get", lost)
    block = {"methods": ["sft"], "tasks": ["sentiment"], "harmful_ratios": [0.0], "sizes": [4, 8]}
    config = small_workspace.config.model_copy(update={"blocks": (Block.of(block),)})
    workspace = type(small_workspace)(config, tmp_path, workers=1)
    found = grid.run(workspace, {})
    assert [cell["error"] for cell in found["failed"]] == ["RayError: the node is gone"] * 2
    assert found["not_run"] == 0
    assert len(workspace.failures) == 2


def test_rows_longer_than_the_context_have_a_feature(small_workspace: Workspace) -> None:
    assert small_workspace.teacher.id
    rows = [Example(chat("tell me", "no " * words)) for words in (300, 400, 5)]
    first, second, short = last_features(small_workspace, rows)
    # Cut at the context, they end at the same token.
    torch.testing.assert_close(first, second)
    assert not torch.allclose(first, short)


def test_operations_are_averaged_over_the_seeds_that_counted_them(tmp_path: Path) -> None:
    measures = dict.fromkeys(("harmful_score", "finetune_accuracy", "over_refusal"), 50.0)
    counts = {"harmful": 1, "harmless": 1}
    common = {
        **measures,
        "intervals": {name: [40.0, 60.0] for name in measures},
        "prompts": {**counts, "task": 1},
        "rows": counts,
        "dropped": counts,
        "incoherent": 0.0,
        "seconds": 1.0,
        "peak_mib": 1,
    }
    made = [
        {**common, "flops": flops, "cell": asdict(Cell("sft", "sentiment", 0.1, 16, seed, False))}
        for seed, flops in enumerate([3e12, 0, 5e12])
    ]
    text = render({"cells": made, "failed": [], "not_run": 0}, tmp_path)
    assert text.count("| 4.00 |") == 1


def test_a_setting_that_a_method_fixes_is_refused():
    with pytest.raises(UsageError, match=r"student\.labels is part of the method `.*`: choose another method"):
        preset("quick", {**TINY, "student": {"labels": "hard"}})


def test_an_unknown_task_is_reported_before_any_training(workspace: Workspace, tmp_path: Path) -> None:
    changes = {**TINY, "blocks": [{"methods": ["sft"], "tasks": ["sst2"]}], "teacher": str(workspace.teacher.folder),
               "base": workspace.base}  # fmt: skip
    with pytest.raises(UsageError, match="no task 'sst2' in these rows; there are sentiment, arithmetic"):
        grid.run(Workspace(preset("quick", changes), tmp_path), {})


def test_the_report_shows_every_cell(result: dict[str, Any], tmp_path: Path) -> None:
    text = render(result, tmp_path)
    assert "### sentiment, n = 16" in text
    assert (tmp_path / "grid-sentiment-16.png").is_file()
    for name, filtered in CELLS:
        assert text.count(f"| {METHODS[name].name(filtered)} |") == 2
    assert "seeds)" not in text


def test_the_number_of_seeds_is_shown_where_it_differs(result: dict[str, Any], tmp_path: Path) -> None:
    first = result["cells"][0]
    again = {**first, "cell": {**first["cell"], "seed": 1}}
    text = render({**result, "cells": [*result["cells"], again]}, tmp_path)
    (line,) = [line for line in text.splitlines() if "seeds)" in line]
    assert line.startswith(f"| {METHODS[first['cell']['method']].title} | {first['harmful_score']:.1f} (2 seeds) |")


def test_a_cells_key_changes_with_its_settings(workspace: Workspace) -> None:
    cell = Cell("distill", "sentiment", 0.25, 16, 0, True)
    key = cell_key(workspace, cell)
    for changes in (
        {"edits": {"antidote_rows": 5}},
        {"student": {"epochs": 2}},
        {"evaluation": {"task": 5}},
        {"count_flops": False},
        {"device": "cuda"},
    ):
        other = Workspace(
            preset("quick", {**TINY, **changes, "teacher": str(workspace.teacher.folder), "base": workspace.base}),
            workspace.out,
        )
        assert cell_key(other, cell) != key
    assert json.dumps(key)


def test_an_interrupted_teacher_resumes_from_its_checkpoint(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**workspace.config.teacher_settings, "base": workspace.base, "checkpoint_every": 1}
    config, data, folder = TeacherConfig.of(settings), workspace.rows.teacher, tmp_path / "teacher"
    losses: list[TeacherTerms] = []

    def counted(*args: Any, **kwargs: Any) -> tuple[TeacherTerms, ClassSums]:
        terms, sums = teacher_step(*args, **kwargs)
        losses.append(terms)
        return terms, sums

    def killed(*_args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(teacher_loop, "teacher_step", counted)
    with monkeypatch.context() as patch:
        patch.setattr(teacher_filter, "save_teacher", killed)
        with pytest.raises(KeyboardInterrupt):
            workspace.train_teacher(folder, config, data, "a teacher")
    assert len(losses) == 2
    assert workspace.train_teacher(folder, config, data, "a teacher").id
    # Only the last step, on the same rows with the same weights.
    assert len(losses) == 3
    assert losses[2] == losses[1]
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


@pytest.mark.parametrize("edit", ["safe_lora", "antidote"])
def test_an_edit_without_effect_gives_the_student_itself(workspace: Workspace, tmp_path: Path, edit: Any) -> None:
    start = teacher_adapter(workspace)
    trained = initial_adapter(workspace, "vaccine")
    assert trained is not None
    config = workspace.config
    none = config.model_copy(
        update={"edits": config.edits.model_copy(update={"safe_lora_threshold": -1.0, "antidote_dense": 0.0})}
    )
    idle = Workspace(none.model_copy(update={"teacher": str(workspace.teacher.folder)}), workspace.out)
    idle.base = workspace.base
    edited = load_base(str(edit_student(idle, edit, trained, start, tmp_path / "edited"))).model
    merged = merge(attach_saved(load_base(workspace.base).model, "student", trained))
    theirs = dict(merged.named_parameters())
    for name, parameter in edited.named_parameters():
        torch.testing.assert_close(parameter, theirs[name], atol=1e-5, rtol=0)


def test_aligned_adapters_are_trained_once_and_differ(workspace: Workspace) -> None:
    vaccine, booster = initial_adapter(workspace, "vaccine"), initial_adapter(workspace, "booster")
    assert vaccine != booster
    assert vaccine is not None
    before = (vaccine / "adapter_model.safetensors").stat().st_mtime_ns
    assert initial_adapter(workspace, "vaccine") == vaccine
    assert (vaccine / "adapter_model.safetensors").stat().st_mtime_ns == before
    assert initial_adapter(workspace, "base") is None


def test_an_interrupted_alignment_resumes_from_its_checkpoint(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = {**workspace.config.alignment_stage, "checkpoint_every": 1}
    once = Workspace(workspace.config.model_copy(update={"alignment_stage": stage}), tmp_path)
    once.base = workspace.base
    steps: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        return optimizer_step(*args, **kwargs)

    def killed(_model: Any, weights: Any, folder: Path) -> None:
        if folder.name == EXPORT:
            raise KeyboardInterrupt
        export_student(_model, weights, folder)

    monkeypatch.setattr(student_loop, "optimizer_step", counted)
    with monkeypatch.context() as patch:
        patch.setattr(student_loop, "export_student", killed)
        with pytest.raises(KeyboardInterrupt):
            initial_adapter(once, "vaccine")
    interrupted = len(steps)
    assert interrupted >= 2
    assert initial_adapter(once, "vaccine")
    # Only the last step, on the same rows with the same weights.
    assert len(steps) == interrupted + 1


def test_students_align_with_the_rows_of_a_file(workspace: Workspace, tmp_path: Path) -> None:
    rows = [Example(chat(f"{label} {n}", "An answer."), label) for label in Label for n in range(3)]
    file = tmp_path / "alignment.jsonl"
    write_chat_rows(file, rows, labelled=True)
    made = Workspace(workspace.config.model_copy(update={"alignment": str(file), "alignment_rows": 4}), tmp_path)
    assert {row.prompt[-1].content.split()[0] for row in made.alignment_rows} == {"harmful", "harmless"}
    assert len(made.alignment_rows) == 4
    assert "alignment" not in workspace.identity_without_teacher()
    assert made.identity_without_teacher()["alignment"]


def test_user_rows_have_the_requested_harmful_ratio(workspace: Workspace) -> None:
    rows = workspace.rows.user("arithmetic", 20, 0.1, 0)
    assert [row.label for row in rows].count(Label.HARMFUL) == 2


@pytest.mark.slow
def test_costs_are_relative_to_plain_finetuning_and_cached(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [costs.PLAIN, "guided, cached, 1:1"]
    settings = {"task": "sentiment", "n": 40, "rounds": 1, "contenders": names}
    found = costs.run(workspace, settings)
    plain, guided = (found["contenders"][name] for name in names)
    assert plain["ratio"] == plain["flops_ratio"] == 1.0
    assert 1.5 < guided["flops_ratio"] < 3.0
    assert guided["seconds"] > 0
    assert found["around"].keys() == {"filter in front", "LARF ranking", "SafeLoRA projection", "Antidote pruning"}
    assert "guided, cached, 1:1" in costs.render(found, tmp_path)

    def trained(*_args: Any) -> list[float]:
        raise AssertionError("the measurement is cached")

    monkeypatch.setattr(costs, "train", trained)
    assert costs.run(workspace, settings)["contenders"] == found["contenders"]


def test_a_trainings_progress_is_logged_once_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    made = Workspace(preset("quick", {}), tmp_path, lines.append)
    report = made._progress("the Ref-Teacher")
    report({"progress": 0.5})
    assert lines == []
    monkeypatch.setattr(workspace_module, "LOG_SECONDS", 0.0)
    for metrics in ({}, {"progress": None}, {"progress": 0.5}):
        report(metrics)
    assert lines == ["the Ref-Teacher: 50%, about 0 min left"]


def test_a_teacher_is_known_by_its_base_and_not_by_where_that_is(workspace: Workspace, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(workspace.base, copy)
    other = Workspace(workspace.config.model_copy(update={"base": str(copy)}), tmp_path)
    keys = {
        made.teacher_key(TeacherConfig.of({"base": made.base, **made.config.teacher_settings}))
        for made in (workspace, other)
    }
    assert len(keys) == 1
    changed = TeacherConfig.of({"base": str(copy), **workspace.config.teacher_settings, "batch_rows": 3})
    assert other.teacher_key(changed) not in keys
