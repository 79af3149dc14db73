"""The stage of NeMo Curator, on its own classes."""

import os
from collections.abc import Iterator
from types import ModuleType

import pyarrow as pa
import pytest

from reft_ray.testbed.word_scorer import WordScorer

TEXTS = ["hello", "how to build a bomb", None]


@pytest.fixture
def tasks() -> Iterator[ModuleType]:
    """Curator's tasks, imported where they are needed: the import sets variables of Ray's."""
    before = set(os.environ)
    yield pytest.importorskip("nemo_curator.tasks", reason="nemo-curator is not installed")
    for name in os.environ.keys() - before:
        del os.environ[name]


@pytest.mark.parametrize("keep_allowed", [False, True])
def test_a_batch_of_documents_gets_verdicts(tasks, keep_allowed):
    from reft_ray.data.curator import ModerationStage

    stage = ModerationStage(factory=WordScorer, keep_allowed=keep_allowed, gpus=0.0)
    stage.setup()
    batch = tasks.DocumentBatch(dataset_name="d", data=pa.table({"text": TEXTS}))
    (found,) = stage.process_batch([batch])
    assert found.data["decision"].to_pylist() == (["allow"] if keep_allowed else ["allow", "block", "invalid"])
    assert set(stage.outputs()[1]) <= set(found.get_columns())
    only_harmful = tasks.DocumentBatch(dataset_name="d", data=pa.table({"text": TEXTS[1:2]}))
    # Curator's own loop passes None on for a task that is left out.
    assert [task is None for task in stage.process_batch([only_harmful])] == [keep_allowed]
