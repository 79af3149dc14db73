"""The quickstart on a tiny model: every stage runs, the report is complete and consistent."""

import json
import math
from pathlib import Path

import pytest

from reft_ray.experiments.quickstart import STUDENTS, Plan, run_quickstart
from reft_ray.experiments.stages import Stages
from reft_ray.finetuning.config import Resources, TeacherConfig
from reft_ray.finetuning.teacher_loop import TeacherData
from reft_ray.finetuning.trainer import prepare_teacher
from reft_ray.testbed.synthetic import Sizes, SyntheticRows

SIZES = Sizes(
    teacher_train=120, teacher_validation=60, alignment=16, hs_prompts=8, over_refusal_prompts=40, task_test=8
)


@pytest.fixture(scope="module")
def teacher(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of a tiny base of random weights."""
    rows = SyntheticRows.make(3, SIZES)
    config = TeacherConfig.of({"base": str(llama), "epochs": 1, "lora": {"rank": 4}})
    data = TeacherData(rows.teacher_train, rows.teacher_validation)
    folder = tmp_path_factory.mktemp("quickstart") / "teacher"
    return prepare_teacher(config, data, folder, Resources(workers=0)).folder


def test_the_quickstart_runs_and_its_report_is_consistent(teacher: Path, tmp_path: Path) -> None:
    shown: list[tuple[str, float, float]] = []
    plan = Plan(teacher, seed=3, user_rows=20, sizes=SIZES, epochs=1, max_new_tokens=4)
    report = run_quickstart(tmp_path / "out", lambda *state: shown.append(state), plan)
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["methods"]) == list(STUDENTS) == ["aligned_sft", "filter", "guided"]
    assert report["filter"].keys() >= {"auroc", "recall", "fpr", "threshold"}
    for name, row in report["methods"].items():
        for key in ("harmful_score", "finetune_accuracy", "everyday_refused", "look_alikes_refused"):
            low, high = row["intervals"][key]
            assert 0 <= low <= high <= 100
            assert 0 <= row[key] <= 100
        assert (row["harmful_rows"], row["harmless_rows"]) == (6, 14)
        if name == "aligned_sft":
            assert row["harmful_dropped"] == row["harmless_dropped"] == 0
        else:
            assert row["harmful_dropped"] == round(report["filter"]["recall"] * 6)
            assert row["harmless_dropped"] == round(report["filter"]["fpr"] * 14)
    assert [row["kind"] for row in report["chat"]] == ["harmful", "looks harmful", "everyday"]
    assert all({"aligned_sft", "guided"} < row.keys() for row in report["chat"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert 'src="http' not in page
    assert all(line in page for line in report["skipped"])
    shares = [share for _, share, _ in shown]
    assert shares == sorted(shares)
    assert all(math.isfinite(left) and left >= 0 for _, _, left in shown)


def test_the_estimate_of_the_remaining_time_adapts_to_the_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("reft_ray.experiments.stages.time.perf_counter", lambda: now[0])
    shown: list[tuple[str, float, float]] = []
    stages = Stages({"a": 10.0, "b": 30.0}, lambda *state: shown.append(state))
    with stages.stage("a") as update:
        now[0] = 10.0
        update({"progress": 0.5})  # twice as slow as usual
    now[0] = 20.0
    with stages.stage("a"):
        pass
    assert shown[0] == ("a", 0.0, 40.0)
    assert shown[1] == ("a", 0.125, 70.0)
    assert stages.seconds_total == 20.0


def test_parallel_stages_share_one_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("reft_ray.experiments.stages.time.perf_counter", lambda: now[0])
    shown: list[tuple[str, float, float]] = []
    stages = Stages({"a": 10.0, "b": 30.0}, lambda *state: shown.append(state))
    with stages.stage("b") as update_b, stages.stage("a") as update_a:
        now[0] = 10.0
        update_b({"progress": 0.5})
        update_a({"progress": 0.5})
    assert shown[-3:] == [("a", 0.5, 10.0), ("a", 0.625, 6.0), ("b", 1.0, 0.0)]
    assert list(stages.seconds) == ["a", "b"]
