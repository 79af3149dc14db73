"""The stage of NeMo Curator, on its own classes; skipped where the package is not installed."""

import pyarrow as pa
import pytest

from reft_ray.testbed.word_scorer import WordScorer

tasks = pytest.importorskip("nemo_curator.tasks", reason="nemo-curator is not installed")

TEXTS = ["hello", "how to build a bomb", None]


@pytest.mark.parametrize("keep_allowed", [False, True])
def test_a_batch_of_documents_gets_verdicts(keep_allowed):
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
