"""The quickstart at a tenth of its size: every stage runs, the report is complete and consistent."""

import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from reft_ray.experiments.quickstart import STUDENTS, Plan, run_in_parallel, run_quickstart, students_at_once
from reft_ray.experiments.stages import Stages
from reft_ray.hf.tiny import TinyShape
from reft_ray.testbed.base_model import Recipe
from reft_ray.testbed.synthetic import Sizes

SMALL = Plan(
    seed=3,
    user_rows=60,
    sizes=Sizes(
        teacher_train=120, teacher_validation=60, alignment=40, hs_prompts=20, over_refusal_prompts=20, task_test=20
    ),
    recipe=Recipe(rows=200, shape=TinyShape(hidden=32, layers=4, heads=2, intermediate=64)),
    teacher_epochs=2,
    student_epochs=1,
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    from reft_ray.local_ray import ensure_training_ray

    ensure_training_ray()
    yield
    ray.shutdown()


@pytest.mark.ray
def test_the_quickstart_runs_and_its_report_is_consistent(cluster: None, tmp_path: Path) -> None:
    shown: list[tuple[str, float, float]] = []
    report = run_quickstart(tmp_path / "out", tmp_path / "cache", lambda *state: shown.append(state), SMALL)
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["methods"]) == list(STUDENTS) == ["sft_clean", "aligned_sft", "filter", "distill", "guided"]
    assert report["filter"].keys() >= {"auroc", "recall", "fpr", "threshold"}
    for name, row in report["methods"].items():
        for key in ("harmful_score", "finetune_accuracy", "over_refusal"):
            low, high = row["intervals"][key]
            assert 0 <= low <= high <= 100
            assert 0 <= row[key] <= 100
        poisoned = name != "sft_clean"
        assert (row["harmful_rows"], row["harmless_rows"]) == (18 if poisoned else 0, 42)
        if name in ("filter", "guided"):
            assert row["harmful_dropped"] == round(report["filter"]["recall"] * 18)
            assert row["harmless_dropped"] == round(report["filter"]["fpr"] * 42)
        else:
            assert row["harmful_dropped"] == row["harmless_dropped"] == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert 'src="http' not in page
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


@pytest.mark.parametrize(
    ("cores", "slots", "workers", "at_once"), [(1, 4, 1, 1), (2, 4, 1, 2), (2, 4, 2, 1), (4, 4, 1, 2), (16, 16, 1, 5)]
)
def test_students_leave_slots_for_ray_data(
    monkeypatch: pytest.MonkeyPatch, cores: int, slots: int, workers: int, at_once: int
) -> None:
    monkeypatch.setattr("reft_ray.experiments.quickstart.ray.cluster_resources", lambda: {"CPU": float(slots)})
    monkeypatch.setattr("reft_ray.experiments.quickstart.os.cpu_count", lambda: cores)
    assert students_at_once(workers) == at_once


def test_results_come_in_order() -> None:
    assert run_in_parallel(str.upper, "abc", 2) == ["A", "B", "C"]


def test_an_error_ends_running_and_waiting_students(monkeypatch: pytest.MonkeyPatch) -> None:
    ray_is_gone = threading.Event()
    monkeypatch.setattr("reft_ray.experiments.quickstart.ray.shutdown", ray_is_gone.set)
    begun: list[str] = []

    def run(name: str) -> str:
        begun.append(name)
        if name == "a":
            raise ValueError(name)
        assert ray_is_gone.wait(30)
        return name

    with pytest.raises(ValueError, match="a"):
        run_in_parallel(run, [*"abcdefgh"], 2)
    assert len(begun) <= 3
