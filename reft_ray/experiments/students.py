"""One student for a table: finetuned in this process on given rows, then measured and held against the gate."""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from reft_ray.core.conversation import Conversation, Example, Label
from reft_ray.evaluation.gate import Gate
from reft_ray.evaluation.suite import (
    FINETUNE_ACCURACY,
    HARMFUL_SCORE,
    OVER_REFUSAL,
    Evaluation,
    Suite,
    TaskTest,
    evaluate,
)
from reft_ray.evaluation.task_accuracy import Match
from reft_ray.experiments.bench.workspace import Workspace
from reft_ray.experiments.chain import Respond, respond_with
from reft_ray.finetuning.config import FinetuneConfig, Resources
from reft_ray.finetuning.trainer import FinetuneInputs, finetune
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.loading import load_base, load_tokenizer
from reft_ray.hf.ref_teacher import RefTeacher


@dataclass(frozen=True)
class Trials:
    """Teacher, base and alignment rows that students share, and the prompts that measure them.

    `student` are FinetuneConfig keys; `task` is the user's task, by its name in the comparison's rows.
    """

    teacher: RefTeacher
    base: str
    task: str
    alignment: Sequence[Example]
    student: Mapping[str, Any]
    hs_prompts: Sequence[Example]
    over_refusal_prompts: Sequence[Example]
    task_test: Sequence[Example]
    match: Match
    max_new_tokens: int
    folder: Path
    seed: int = 0

    @classmethod
    def of(
        cls,
        workspace: Workspace,
        task: str | None,
        evaluated: int,
        alignment_rows: int,
        changes: Mapping[str, Any],
        seed: int,
    ) -> Trials:
        """From a workspace: its first task where none is named, at most `evaluated` prompts of each kind."""
        rows = workspace.rows
        task = task or next(iter(rows.tasks))
        test = rows.task(task)
        return cls(
            teacher=workspace.teacher,
            base=workspace.base,
            task=task,
            alignment=some_alignment(rows.alignment, alignment_rows, seed),
            student={**workspace.config.student, **changes},
            hs_prompts=_some(rows.hs_prompts, evaluated, seed),
            over_refusal_prompts=_some(rows.over_refusal_prompts, evaluated, seed),
            task_test=_some(test.test, evaluated, seed),
            match=test.match,
            max_new_tokens=workspace.config.evaluation.max_new_tokens,
            folder=workspace.out / "students",
            seed=seed,
        )

    @cached_property
    def _chat(self) -> ChatFormat:
        return ChatFormat(load_tokenizer(self.base))

    @cached_property
    def _max_tokens(self) -> int:
        return int(self.student.get("max_tokens") or load_base(self.base).context)

    def holds(self, row: Example) -> bool:
        """Whether training can take the row: its prompt leaves room for an answer."""
        return len(self._chat.prompt(row.prompt)) < self._max_tokens

    @cached_property
    def reference(self) -> Evaluation:
        """The base model on the same questions: what the gate compares with."""
        return self._evaluate(respond_with(self.base, None, self.max_new_tokens))

    def _evaluate(self, respond: Respond) -> Evaluation:
        return evaluate(
            respond,
            Suite(
                harmful=[row.prompt for row in self.hs_prompts],
                harmless=[row.prompt for row in self.over_refusal_prompts],
                tasks={self.task: TaskTest(self.task_test, self.match)},
                seed=self.seed,
            ),
        )

    def train(
        self, rows: Sequence[Example], changes: Mapping[str, Any], also_asked: Sequence[Conversation] = ()
    ) -> dict[str, Any]:
        """Train on rows that were screened already, or on purpose not, and measure.

        `also_asked` are harmful prompts in another form: their HS stands beside the usual one.
        """
        config = FinetuneConfig.of({"base": self.base, "seed": self.seed, **self.student, **changes})
        alignment = self.alignment if config.method.distills else ()
        inputs = FinetuneInputs(list(rows), len(rows), alignment, self.teacher)
        adapter = finetune(config, inputs, self.folder / "adapter", Resources(workers=0, shared=str(self.folder)))
        respond = respond_with(self.base, adapter, self.max_new_tokens)
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
        # Checkpoints and weights; the soft labels are kept for the next student.
        for made in (self.folder / "adapter", self.folder / ".runs"):
            shutil.rmtree(made, ignore_errors=True)
        return figures


def some_alignment(rows: Sequence[Example], count: int, seed: int) -> list[Example]:
    """Refusals and helpful answers, half each."""
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)  # noqa: S311
    return [row for label in Label for row in [row for row in shuffled if row.label is label][: count // 2]]


def _some(rows: Sequence[Example], count: int, seed: int) -> list[Example]:
    rng = random.Random(seed)  # noqa: S311
    return rng.sample(list(rows), min(count, len(rows)))
