"""All rows of a comparison, from a folder of real rows or from the built-in world."""

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
"""A worked answer ends with its number: nine in ten of GSM8K's fit."""
_SAMPLED_USER_ROWS = 100


@dataclass(frozen=True, slots=True)
class TaskRows:
    """A task's test rows and how its answers are compared; `answer_tokens` is the room that they need at least."""

    test: Sequence[Example]
    match: Match
    answer_tokens: int = 0


@dataclass(frozen=True, slots=True)
class BenchRows:
    """`identity` is a hash of everything here. `complied` are harmful prompts of the provider's own, answered.

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
        """One task. Raises UsageError for a name that is not there."""
        if name not in self.tasks:
            raise UsageError(f"no task {name!r} in these rows; there are {', '.join(self.tasks)}")
        return self.tasks[name]


def some(rows: Sequence[Example], count: int, seed: int = 0) -> list[Example]:
    """At most `count` rows, drawn by a seed: files are sorted by source, so their beginning is no sample."""
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
    """A hash over the files that are read: by content, so that a copy elsewhere is the same."""
    digest = hashlib.sha256()
    for folder in ("teacher", "tasks", "attacks", "dev"):
        for path in sorted((data / folder).glob("*.jsonl")):
            with path.open("rb") as content:
                digest.update(f"{folder}/{path.name}".encode() + hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]


def builtin_rows(sizes: Sizes, seed: int = 0) -> BenchRows:
    """The built-in world: complete, answers included, and far easier than real rows."""
    world = SyntheticRows.make(seed, sizes)
    tests = {task: world.task_test(task) for task in Task}
    # A user's rows of one size stand for all sizes, which the same grammar writes.
    users = [row for task in Task for row in world.user_rows(_SAMPLED_USER_ROWS, 0.3, task)]
    parts = (
        world.teacher_train,
        world.teacher_validation,
        world.alignment,
        world.hs_prompts,
        world.over_refusal_prompts,
        *tests.values(),
        users,
    )
    texts = [[turn.content for turn in row.messages] for part in parts for row in part]
    identity = json.dumps(["builtin", seed, asdict(sizes), texts])
    return BenchRows(
        identity="builtin-" + hashlib.sha256(identity.encode()).hexdigest()[:16],
        teacher=TeacherData(world.teacher_train, world.teacher_validation),
        alignment=world.alignment,
        complied=complying([row for row in world.teacher_train if row.label is Label.HARMFUL]),
        hs_prompts=world.hs_prompts,
        over_refusal_prompts=world.over_refusal_prompts,
        tasks={
            task.value: TaskRows(test, Match.LABEL if task is Task.SENTIMENT else Match.NUMBER)
            for task, test in tests.items()
        },
        user=lambda task, n, ratio, user_seed: world.user_rows(n, ratio, Task(task), user_seed),
    )
