"""Metrics in the trackers themselves, without a network."""

import importlib.util
from pathlib import Path

import pytest

from reft_ray.core.errors import UsageError
from reft_ray.finetuning.tracking import tracked

REPORTS = [{"step": 1, "loss": 2.0, "saved": False}, {"step": 2, "loss": 1.0, "note": "row text?", "saved": True}]
CONFIG = {"base": "b", "optimizer": {"learning_rate": 1e-4}, "threshold": None}


def follow(kind: str, folder: Path) -> list[object]:
    passed: list[object] = []
    with tracked(kind, "run-1", CONFIG, folder, passed.append) as progress:
        for report in (*REPORTS, {"step": 2, "loss": 9.0, "earlier": REPORTS}):
            progress(report)
    return passed


def test_tensorboard_has_every_figure_once(tmp_path: Path) -> None:
    assert len(follow("tensorboard", tmp_path)) == 3
    from tensorboardX.proto.event_pb2 import Event

    (file,) = (tmp_path / "run-1").iterdir()
    data, found, at = file.read_bytes(), [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")  # tensorboardX has no reader
        event = Event.FromString(data[at + 12 : at + 12 + size])
        found += [(event.step, v.tag, v.simple_value) for v in event.summary.value if v.tag == "loss"]
        at += 16 + size
    assert found == [(1, "loss", 2.0), (2, "loss", 1.0)]
    assert b"row text?" not in data


@pytest.mark.filterwarnings("ignore")  # those of mlflow's own use of SQLAlchemy
@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow_has_figures_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    # In files, as the tables of a new database take seconds.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    place = (tmp_path / "mlflow").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place)
    mlflow.set_tracking_uri(place)
    follow("mlflow", tmp_path)
    (run,) = mlflow.search_runs(output_format="list")
    assert run.data.metrics["loss"] == 1.0
    assert run.data.params == {"base": "b", "optimizer.learning_rate": "0.0001"}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_writes_an_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    follow("wandb", tmp_path)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_an_unknown_or_absent_tracker_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--track x: one of wandb, mlflow, tensorboard"):
        follow("x", tmp_path)
    monkeypatch.setattr("reft_ray.finetuning.tracking.find_spec", lambda _: None)
    with pytest.raises(UsageError, match="not installed: pip install wandb"):
        follow("wandb", tmp_path)


def test_a_tracker_that_fails_costs_its_metrics_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorboardX

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(tensorboardX.SummaryWriter, "add_scalar", fail)
    assert len(follow("tensorboard", tmp_path)) == 3


def test_without_a_tracker_the_reports_pass_unchanged(tmp_path: Path) -> None:
    seen: list[object] = []
    with tracked(None, "run", {}, tmp_path, seen.append) as progress:
        progress(REPORTS[0])
    assert seen == [REPORTS[0]]
    assert not list(tmp_path.iterdir())
