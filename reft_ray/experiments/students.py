"""One student for a table: finetuned in this process on given rows, then measured and held against the gate."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from reft_ray.core.conversation import Conversation, Example
from reft_ray.evaluation.gate import Gate
from reft_ray.evaluation.judges import Respond
from reft_ray.evaluation.suite import (
    FINETUNE_ACCURACY,
    HARMFUL_SCORE,
    OVER_REFUSAL,
    Evaluation,
    Suite,
    TaskTest,
    evaluate,
)
from reft_ray.experiments.bench.rows import some
from reft_ray.experiments.bench.starts import alignment_rows
from reft_ray.experiments.bench.workspace import Workspace
from reft_ray.finetuning.config import FinetuneConfig
from reft_ray.finetuning.trainer import FinetuneInputs, finetune
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.loading import context_of, load_tokenizer


class Trials:
    """Students that share a teacher, a base, alignment rows and the prompts that measure them.

    `task` is the user's task by its name in the comparison's rows (default: the first), `changes` are FinetuneConfig
    keys on top of the comparison's own; at most `evaluated` prompts of each kind are asked.
    """

    def __init__(
        self, workspace: Workspace, task: str | None, evaluated: int, changes: Mapping[str, Any], seed: int
    ) -> None:
        rows = workspace.rows
        self.workspace = workspace
        self.teacher, self.base = workspace.teacher, workspace.base
        self.task = task or next(iter(rows.tasks))
        self.student = {"checkpoint_every": 1_000_000, **workspace.config.student, **changes}
        self.seed = seed
        self.folder = workspace.out / "students"
        self.hs_prompts = some(rows.hs_prompts, evaluated, seed)
        self.over_refusal_prompts = some(rows.over_refusal_prompts, evaluated, seed)
        self.test = rows.task(self.task)
        self.task_test = some(self.test.test, evaluated, seed)

    @cached_property
    def alignment(self) -> list[Example]:
        """The comparison's alignment rows, so that all students share one file of soft labels."""
        return alignment_rows(self.workspace)

    def config(self, changes: Mapping[str, Any]) -> FinetuneConfig:
        """The configuration of one student."""
        return FinetuneConfig.of({"base": self.base, "seed": self.seed, **self.student, **changes})

    @cached_property
    def _chat(self) -> ChatFormat:
        return ChatFormat(load_tokenizer(self.base))

    @cached_property
    def _max_tokens(self) -> int:
        return int(self.student.get("max_tokens") or context_of(self.base))

    def holds(self, row: Example) -> bool:
        """Whether training can take the row: its prompt leaves room for an answer."""
        return len(self._chat.prompt(row.prompt)) < self._max_tokens

    @cached_property
    def reference(self) -> Evaluation:
        """The base model on the same questions: what the gate compares with."""
        return self._evaluate(self.workspace.respond(None, self.test))

    def _evaluate(self, respond: Respond) -> Evaluation:
        return evaluate(
            respond,
            Suite(
                harmful=[row.prompt for row in self.hs_prompts],
                harmless=[row.prompt for row in self.over_refusal_prompts],
                tasks={self.task: TaskTest(self.task_test, self.test.match)},
                seed=self.seed,
            ),
        )

    def train(
        self, rows: Sequence[Example], changes: Mapping[str, Any], also_asked: Sequence[Conversation] = ()
    ) -> dict[str, Any]:
        """Train on rows that were screened already, or on purpose not, and measure.

        `also_asked` are harmful prompts in another form: their HS stands beside the usual one.
        """
        config = self.config(changes)
        alignment = self.alignment if config.needs_alignment else ()
        inputs = FinetuneInputs(list(rows), len(rows), alignment, self.teacher)
        adapter = finetune(config, inputs, self.folder / "adapter", self.workspace.resources(self.folder / "runs"))
        respond = self.workspace.respond(adapter, self.test)
        found = self._evaluate(respond)
        gate = Gate().check(found, self.reference)
        figures: dict[str, Any] = {
            "rows": len(rows),
            "harmful_score": found[HARMFUL_SCORE].as_dict(),
            "over_refusal": found[OVER_REFUSAL].as_dict(),
            "finetune_accuracy": found[f"{FINETUNE_ACCURACY}/{self.task}"].as_dict(),
            "gate": {"passed": gate.passed, "failures": [check.measure for check in gate.failures]},
        }
        if also_asked:
            asked = evaluate(respond, Suite(harmful=also_asked, seed=self.seed))
            figures["harmful_score_rewritten"] = asked[HARMFUL_SCORE].as_dict()
        shutil.rmtree(self.folder, ignore_errors=True)
        return figures
