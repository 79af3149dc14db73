"""The whole chain at a tenth of its size: every stage real, the report complete and consistent with itself."""

import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from reft_ray.experiments.quickstart import STUDENTS, Plan, run_quickstart, side_by_side, students_at_once
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

    from reft_ray.finetuning.cluster import start_ray

    start_ray()
    yield
    ray.shutdown()


@pytest.mark.ray
def test_the_chain_runs_and_its_report_adds_up(cluster: None, tmp_path: Path) -> None:
    told: list[tuple[str, float, float]] = []
    report = run_quickstart(tmp_path / "out", tmp_path / "cache", lambda *state: told.append(state), SMALL)
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
    shares = [share for _, share, _ in told]
    assert shares == sorted(shares)
    assert all(math.isfinite(left) and left >= 0 for _, _, left in told)


def test_the_estimate_of_the_time_left_follows_this_machines_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("reft_ray.experiments.stages.time.perf_counter", lambda: now[0])
    told: list[tuple[str, float, float]] = []
    stages = Stages({"a": 10.0, "b": 30.0}, lambda *state: told.append(state))
    with stages.stage("a") as tell:
        now[0] = 10.0
        tell({"progress": 0.5})  # twice as slow as usual
    now[0] = 20.0
    with stages.stage("a"):
        pass
    assert told[0] == ("a", 0.0, 40.0)
    assert told[1] == ("a", 0.125, 70.0)
    assert stages.seconds_total == 20.0


def test_stages_side_by_side_share_one_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("reft_ray.experiments.stages.time.perf_counter", lambda: now[0])
    told: list[tuple[str, float, float]] = []
    stages = Stages({"a": 10.0, "b": 30.0}, lambda *state: told.append(state))
    with stages.stage("b") as tell_b, stages.stage("a") as tell_a:
        now[0] = 10.0
        tell_b({"progress": 0.5})
        tell_a({"progress": 0.5})
    assert told[-3:] == [("a", 0.5, 10.0), ("a", 0.625, 6.0), ("b", 1.0, 0.0)]
    assert list(stages.seconds) == ["a", "b"]


@pytest.mark.parametrize(
    ("cores", "slots", "workers", "at_once"), [(1, 4, 1, 1), (2, 4, 1, 2), (2, 4, 2, 1), (4, 4, 1, 2), (16, 16, 1, 5)]
)
def test_students_leave_slots_for_the_rows(
    monkeypatch: pytest.MonkeyPatch, cores: int, slots: int, workers: int, at_once: int
) -> None:
    monkeypatch.setattr("reft_ray.experiments.quickstart.ray.cluster_resources", lambda: {"CPU": float(slots)})
    monkeypatch.setattr("reft_ray.experiments.quickstart.os.cpu_count", lambda: cores)
    assert students_at_once(workers) == at_once


def test_results_come_in_order() -> None:
    assert side_by_side(str.upper, "abc", 2) == ["A", "B", "C"]


def test_an_error_ends_what_runs_and_what_was_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
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
        side_by_side(run, [*"abcdefgh"], 2)
    assert len(begun) <= 3
