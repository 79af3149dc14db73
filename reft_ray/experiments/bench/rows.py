"""All rows of a comparison: real ones from a folder, or synthetic ones."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from reft_ray.core.conversation import Example, Label
from reft_ray.core.errors import UsageError
from reft_ray.evaluation.task_accuracy import Match
from reft_ray.experiments.real_rows import complying, mixed, short, teacher_rows
from reft_ray.finetuning.prompts import read_labelled
from reft_ray.finetuning.teacher_loop import TeacherData
from reft_ray.testbed.synthetic import Sizes, SyntheticRows
from reft_ray.testbed.tasks import Task

MATCHES = {"sst2": Match.LABEL, "agnews": Match.LABEL, "gsm8k": Match.NUMBER}
_ANSWER_TOKENS = {"gsm8k": 192}
"""A worked answer ends with its number; nine in ten of GSM8K fit."""
_SAMPLED_USER_ROWS = 100


@dataclass(frozen=True, slots=True)
class TaskRows:
    """A task's test rows and how its answers are compared; `answer_tokens` is the length that they need at least."""

    test: Sequence[Example]
    match: Match
    answer_tokens: int = 0


@dataclass(frozen=True, slots=True)
class BenchRows:
    """`identity` is a hash of all rows. `complied` are harmful prompts of the provider with complying answers.

    The provider's rows (teacher, alignment, complied), a user's rows and the evaluation prompts are disjoint.
    `user(task, n, harmful_ratio, seed)` draws a user's rows, labelled for reports.
    """

    identity: str
    teacher: TeacherData
    alignment: Sequence[Example]
    complied: Sequence[Example]
    hs_prompts: Sequence[Example]
    over_refusal_prompts: Sequence[Example]
    tasks: Mapping[str, TaskRows]
    user: Callable[[str, int, float, int], list[Example]]

    def task(self, name: str) -> TaskRows:
        """One task. Raises UsageError for an unknown name."""
        if name not in self.tasks:
            raise UsageError(f"no task {name!r} in these rows; there are {', '.join(self.tasks)}")
        return self.tasks[name]


def sample_rows(rows: Sequence[Example], count: int, seed: int = 0) -> list[Example]:
    """At most `count` rows, drawn by a seed: files are sorted by source, so their first rows are not a sample."""
    return random.Random(seed).sample(list(rows), min(count, len(rows)))  # noqa: S311


def folder_rows(data: Path) -> BenchRows:
    """Real rows (see `experiments.real_rows`); answers of harmful requests are a placeholder opening."""
    teacher = teacher_rows(data)
    provided = [*teacher.train, *teacher.answers]
    poison = complying(short(read_labelled(data / "attacks/poison_prompts.jsonl")))
    train_rows = {task: short(read_labelled(data / f"tasks/{task}_train.jsonl", Label.HARMLESS)) for task in MATCHES}

    def user(task: str, n: int, ratio: float, seed: int) -> list[Example]:
        harmful, harmless = len(poison), len(train_rows[task])
        if round(n * ratio) > harmful or n - round(n * ratio) > harmless:
            raise UsageError(f"{n} rows at ratio {ratio} need more than the {harmful} harmful and {harmless} task rows")
        return mixed(poison, train_rows[task], n, ratio, seed)

    return BenchRows(
        identity=_digest(data),
        teacher=teacher,
        alignment=[row for row in provided if row.answered],
        complied=complying([row for row in provided if row.label is Label.HARMFUL]),
        hs_prompts=short(read_labelled(data / "attacks/hs_prompts.jsonl")),
        over_refusal_prompts=short(read_labelled(data / "attacks/over_refusal_prompts.jsonl")),
        tasks={
            task: TaskRows(
                short(read_labelled(data / f"tasks/{task}_dev.jsonl", Label.HARMLESS)),
                match,
                _ANSWER_TOKENS.get(task, 0),
            )
            for task, match in MATCHES.items()
        },
        user=user,
    )


def _digest(data: Path) -> str:
    """A hash over the content of the files that are read, so that a copy elsewhere has the same identity."""
    digest = hashlib.sha256()
    for folder in ("teacher", "tasks", "attacks", "dev"):
        for path in sorted((data / folder).glob("*.jsonl")):
            with path.open("rb") as content:
                digest.update(f"{folder}/{path.name}".encode() + hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]


def builtin_rows(sizes: Sizes, seed: int = 0) -> BenchRows:
    """Synthetic rows: complete, answers included, and far easier than real rows."""
    synthetic = SyntheticRows.make(seed, sizes)
    tests = {task: synthetic.task_test(task) for task in Task}
    # Rows of one size identify those of all sizes: the same grammar generates them.
    users = [row for task in Task for row in synthetic.user_rows(_SAMPLED_USER_ROWS, 0.3, task)]
    parts = (
        synthetic.teacher_train,
        synthetic.teacher_validation,
        synthetic.alignment,
        synthetic.hs_prompts,
        synthetic.over_refusal_prompts,
        *tests.values(),
        users,
    )
    texts = [[turn.content for turn in row.messages] for part in parts for row in part]
    identity = json.dumps(["builtin", seed, asdict(sizes), texts])
    return BenchRows(
        identity="builtin-" + hashlib.sha256(identity.encode()).hexdigest()[:16],
        teacher=TeacherData(synthetic.teacher_train, synthetic.teacher_validation),
        alignment=synthetic.alignment,
        complied=complying([row for row in synthetic.teacher_train if row.label is Label.HARMFUL]),
        hs_prompts=synthetic.hs_prompts,
        over_refusal_prompts=synthetic.over_refusal_prompts,
        tasks={
            task.value: TaskRows(test, Match.LABEL if task is Task.SENTIMENT else Match.NUMBER)
            for task, test in tests.items()
        },
        user=lambda task, n, ratio, user_seed: synthetic.user_rows(n, ratio, Task(task), user_seed),
    )
