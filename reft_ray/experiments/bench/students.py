"""Students of a comparison on one task: they share base, alignment rows and evaluation prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from reft_ray.core.conversation import Conversation, Example
from reft_ray.evaluation.suite import Evaluation, Suite, TaskTest, evaluate
from reft_ray.experiments.bench.config import Evaluated
from reft_ray.experiments.bench.rows import sample_rows
from reft_ray.experiments.bench.workspace import Workspace
from reft_ray.experiments.student import Figures, FilteredRows, filter_rows, run_student
from reft_ray.finetuning.config import FinetuneConfig
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.loading import context_of, load_tokenizer
from reft_ray.screening.config import ScreenConfig


class Students:
    """Grid cells, ablations and attacks differ in `changes` (FinetuneConfig keys), rows and edits only.

    `task` is named as in the comparison's rows (default: the first); `evaluated` limits the prompts of each kind.
    """

    def __init__(
        self,
        workspace: Workspace,
        task: str | None,
        changes: Mapping[str, Any],
        seed: int,
        evaluated: Evaluated | int | None = None,
    ) -> None:
        self.workspace = workspace
        self.task = task or next(iter(workspace.rows.tasks))
        self.test = workspace.rows.task(self.task)
        self.seed = seed
        if isinstance(evaluated, int):
            limits = dict.fromkeys(("harmful", "harmless", "task"), evaluated)
            evaluated = workspace.config.evaluation.model_copy(update=limits)
        self.evaluated = evaluated or workspace.config.evaluation
        self._settings = {"checkpoint_every": 1_000_000, **workspace.config.student, **changes, "seed": seed}

    def config(self, changes: Mapping[str, Any]) -> FinetuneConfig:
        """The configuration of one student."""
        return FinetuneConfig.of({"base": self.workspace.base, **self._settings, **changes})

    def key(self, config: FinetuneConfig) -> dict[str, Any]:
        """What a student's figures depend on, besides its rows, its initial adapter and edits."""
        comparison = self.workspace.config
        return {
            "student": config.model_dump(mode="json", exclude={"base", "init_adapter"}),
            "task": self.task,
            "evaluation": self.evaluated.model_dump(),
            "judges": [judge.model_dump(mode="json", exclude={"key"}) for judge in comparison.judges],
            "alignment_rows": comparison.alignment_rows,
            "device": comparison.device,
            "count_flops": comparison.count_flops,
        }

    @cached_property
    def suite(self) -> Suite:
        """The same prompts for all students of a task, whatever their seeds."""
        rows, asked = self.workspace.rows, self.evaluated
        return Suite(
            harmful=[row.prompt for row in sample_rows(rows.hs_prompts, asked.harmful)],
            harmless=[row.prompt for row in sample_rows(rows.over_refusal_prompts, asked.harmless)],
            tasks={self.task: TaskTest(sample_rows(self.test.test, asked.task), self.test.match)},
            judges=self.workspace.judges,
            seed=self.seed,
        )

    @cached_property
    def reference(self) -> Evaluation:
        """The base model's evaluation, which the release gate compares with."""
        return evaluate(self.workspace.respond(None, self.test), self.suite)

    def fits(self, row: Example) -> bool:
        """Whether the prompt leaves space for an answer in the longest training row."""
        return len(self._chat.prompt(row.prompt)) < self._max_tokens

    @cached_property
    def _chat(self) -> ChatFormat:
        return ChatFormat(load_tokenizer(self.workspace.base))

    @cached_property
    def _max_tokens(self) -> int:
        return int(self._settings.get("max_tokens") or context_of(self.workspace.base))

    def filter(
        self,
        rows: Sequence[Example],
        folder: Path,
        screening: ScreenConfig | None = None,
        precision: str = "float32",
        threshold: float | None = None,
    ) -> FilteredRows:
        """See `experiments.student.filter_rows`, by the comparison's Ref-Teacher."""
        return filter_rows(rows, self.workspace.teacher, self.workspace.base, folder, screening, precision, threshold)

    def run(
        self,
        config: FinetuneConfig,
        rows: Sequence[Example],
        folder: Path,
        edit: Callable[[Path], Path] | None = None,
        gate: bool = False,
        rewritten: Sequence[Conversation] = (),
    ) -> Figures:
        """Train and evaluate one student with its files in `folder`; see `experiments.student.run_student`."""
        workspace = self.workspace
        return run_student(
            config,
            rows,
            workspace.teacher if config.reads_teacher else None,
            folder / "student",
            suite=self.suite,
            respond=lambda student: workspace.respond(student, self.test),
            resources=workspace.resources(folder / "runs"),
            alignment=workspace.alignment_rows,
            edit=edit,
            reference=self.reference if gate else None,
            rewritten=rewritten,
            count_flops=workspace.config.count_flops,
        )
