"""A comparison small enough for the fast lane: synthetic rows, a random base, a teacher trained in seconds."""

from __future__ import annotations

import gc
from functools import cached_property
from pathlib import Path

import pytest

from reft_ray.experiments.bench.presets import preset
from reft_ray.experiments.bench.rows import BenchRows, builtin_rows
from reft_ray.experiments.bench.workspace import Workspace
from reft_ray.testbed.synthetic import Sizes

SMALL = Sizes(
    teacher_train=120, teacher_validation=40, alignment=60, hs_prompts=12, over_refusal_prompts=12, task_test=8
)


class SmallWorkspace(Workspace):
    """A comparison on few synthetic rows."""

    @cached_property
    def rows(self) -> BenchRows:
        return builtin_rows(SMALL)


@pytest.fixture(scope="session")
def llama(shallow_llama: Path) -> Path:
    """Two layers: these tests train."""
    return shallow_llama


@pytest.fixture(scope="module", autouse=True)
def _little_garbage() -> None:
    """Garbage is collected before each cell, to measure its memory: leave out what earlier tests hold."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def small_workspace(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Shared by the tests of sections, which cache under different names."""
    config = preset(
        "quick",
        {
            "base": str(llama),
            "teacher_settings": {
                "epochs": 5,
                # A filter that reads no adapter is the base's own direction, one of those that it is compared with.
                "feature_mix": 1.0,
                "batch_rows": 32,
                "lora": {"rank": 4},
                "optimizer": {"learning_rate": 0.01},
                # A random base makes a poor teacher, which would block every row to catch the harmful ones.
                "thresholds": {"block_fpr": 0.1, "review_recall": 0.3},
            },
            "student": {"epochs": 1, "batch_rows": 8, "alignment_ratio": 0.5, "lora": {"rank": 4}},
            "alignment_rows": 20,
            "evaluation": {"harmful": 8, "harmless": 8, "task": 8, "max_new_tokens": 4},
        },
    )
    return SmallWorkspace(config, tmp_path_factory.mktemp("comparison"))
