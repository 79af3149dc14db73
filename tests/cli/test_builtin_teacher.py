"""The built-in teacher is trained once, and again if its settings or its format changed."""

import json
from functools import partial
from pathlib import Path

import pytest

from reft_ray.cli.serve import trained_builtin
from reft_ray.pipeline import builtin
from reft_ray.pipeline.builtin import teacher_settings
from reft_ray.testbed import base_model
from reft_ray.testbed.synthetic import Sizes, SyntheticRows

SIZES = Sizes(teacher_train=48, teacher_validation=24, alignment=8, hs_prompts=8, over_refusal_prompts=8, task_test=8)


@pytest.fixture
def cache(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, a base with random weights and few rows."""
    rows = SyntheticRows.make(0, SIZES)
    monkeypatch.setenv("REFT_CACHE", str(tmp_path))
    monkeypatch.setattr(base_model, "ensure_base", lambda *_args, **_settings: llama)
    monkeypatch.setattr(SyntheticRows, "make", lambda _seed: rows)
    train_for(1.0, monkeypatch)
    return tmp_path


def train_for(epochs: float, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(builtin, "teacher_settings", partial(teacher_settings, epochs=epochs))


def trained_at(folder: Path) -> int:
    return (folder / "teacher.json").stat().st_mtime_ns


def test_it_is_trained_once(cache: Path) -> None:
    folder = trained_builtin()
    before = trained_at(folder)
    assert trained_builtin() == folder
    assert trained_at(folder) == before


def test_it_is_trained_again_with_changed_settings(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained_builtin()
    train_for(2.0, monkeypatch)
    folder = trained_builtin()
    assert json.loads((folder / "teacher.json").read_text())["config"]["epochs"] == 2.0


def test_it_is_trained_again_if_its_format_is_unknown(cache: Path) -> None:
    manifest = trained_builtin() / "teacher.json"
    found = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**found, "format": 0}))
    trained_builtin()
    assert json.loads(manifest.read_text())["format"] == found["format"]
