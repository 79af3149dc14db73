"""A Ref-Teacher as a stage of NeMo Curator: a `ProcessingStage` from documents to documents with verdicts.

Import it where `nemo_curator` is installed; the rest of the package does not need it.
"""

from __future__ import annotations

from typing import Any

from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources
from nemo_curator.tasks import DocumentBatch

from reft_ray.core.verdict import Decision
from reft_ray.data.moderate import VERDICT, Moderate


class ModerationStage(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Adds the columns of `moderate.VERDICT` to a batch of documents, or (`keep_allowed`) leaves out all other rows.

    `column` holds texts, lists of messages, or messages in JSON; the other arguments are those of `Moderate`. The
    judge is loaded once in each worker.
    """

    name = "reft_moderation"

    def __init__(
        self, column: str = "text", keep_allowed: bool = False, cpus: float = 1.0, gpus: float = 0.0, **judge: Any
    ) -> None:
        self.resources = Resources(cpus=cpus, gpus=gpus)
        self._column, self._keep_allowed, self._judge = column, keep_allowed, judge
        self._moderate: Moderate | None = None

    def inputs(self) -> tuple[list[str], list[str]]:
        """The attributes of the task and the columns that must be present."""
        return ["data"], [self._column]

    def outputs(self) -> tuple[list[str], list[str]]:
        """The attributes of the task and the columns that are added."""
        return ["data"], VERDICT.names

    def setup(self, worker_metadata: Any = None) -> None:
        """Load the judge."""
        self._moderate = Moderate(column=self._column, **self._judge)

    def process(self, task: DocumentBatch) -> DocumentBatch | None:
        """The batch with verdicts; None where no row is left."""
        if self._moderate is None:
            self.setup()
        assert self._moderate is not None
        judged = self._moderate(task.to_pyarrow())
        if self._keep_allowed:
            allowed = [decision == str(Decision.ALLOW) for decision in judged["decision"].to_pylist()]
            judged = judged.filter(allowed)
        if not judged.num_rows:
            return None
        values = {"dataset_name": task.dataset_name, "data": judged, "_metadata": task._metadata}
        return DocumentBatch(**values, _stage_perf=task._stage_perf)
