"""The synthetic dataset: rows of every split, from a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from reft_ray.atomic import atomic_write
from reft_ray.core.conversation import Example, Label, chat
from reft_ray.testbed import answers
from reft_ray.testbed.grammar import CONTRAST_KINDS, HARMFUL_KINDS, Kind, Request, prompt, requests
from reft_ray.testbed.splits import Split
from reft_ray.testbed.tasks import Task, draw, trivia, words_of

Sampler = Callable[[random.Random], Example]
_MAX_DUPLICATES = 1000
"""After this many duplicates in a row, all rows are taken to be known."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many rows each part has."""

    teacher_train: int = 4000
    teacher_validation: int = 1500
    alignment: int = 4000
    hs_prompts: int = 300
    over_refusal_prompts: int = 300
    task_test: int = 400


@dataclass(frozen=True, slots=True)
class SyntheticRows:
    """Labelled rows for the teacher, alignment rows, and evaluation prompts; user rows and task tests on demand.

    No vocabulary combination and no sentence frame of a request occurs in two splits; within a part no prompt twice.
    """

    seed: int
    sizes: Sizes
    teacher_train: tuple[Example, ...]
    teacher_validation: tuple[Example, ...]
    alignment: tuple[Example, ...]
    hs_prompts: tuple[Example, ...]
    over_refusal_prompts: tuple[Example, ...]

    @classmethod
    def make(cls, seed: int = 0, sizes: Sizes | None = None) -> SyntheticRows:
        """The dataset of a seed; each split's combinations do not depend on it, only their sampling."""
        sizes = sizes or Sizes()
        train, validation = Split.TEACHER_TRAIN, Split.TEACHER_VALIDATION
        return cls(
            seed=seed,
            sizes=sizes,
            teacher_train=_labelled(sizes.teacher_train, train, _rng(seed, "teacher_train"), answered=0.6),
            teacher_validation=_labelled(
                sizes.teacher_validation, validation, _rng(seed, "teacher_validation"), answered=0.0
            ),
            alignment=_labelled(sizes.alignment, train, _rng(seed, "alignment"), answered=1.0),
            hs_prompts=_distinct(
                sizes.hs_prompts, partial(_request, _harmful_kind, Split.EVALUATION), _rng(seed, "hs_prompts")
            ),
            over_refusal_prompts=_distinct(
                sizes.over_refusal_prompts,
                partial(_request, _mostly_contrast_kind, Split.EVALUATION),
                _rng(seed, "over_refusal_prompts"),
            ),
        )

    def user_rows(self, n: int, harmful_ratio: float, task: Task | str, seed: int = 0) -> list[Example]:
        """n shuffled rows of a user: `round(n * harmful_ratio)` harmful requests, complied with, among task rows.

        The labels are for reports; real user rows have none.
        """
        if not 0.0 <= harmful_ratio <= 1.0:
            raise ValueError(f"harmful_ratio needs to be in [0, 1], got {harmful_ratio}")
        rng = _rng(self.seed, f"user_rows/{task}/{seed}")
        harmful = round(n * harmful_ratio)
        rows = [
            *_distinct(harmful, _poison, rng),
            *_distinct(n - harmful, partial(_task_row, Task(task), _user_owned(Task(task))), rng),
        ]
        rng.shuffle(rows)
        return rows

    def task_test(self, task: Task | str) -> list[Example]:
        """Answered test rows of a task: combinations that no user row has, of words that user rows have.

        A word absent from finetuning would test the base model's knowledge.
        """
        task = Task(task)
        words = words_of(task, _user_owned(task))
        sampler = partial(_task_row, task, lambda split: split is Split.EVALUATION, words=words)
        return list(_distinct(self.sizes.task_test, sampler, _rng(self.seed, f"task_test/{task}")))


def _rng(seed: int, part: str) -> random.Random:
    return random.Random(f"{seed}/{part}")  # noqa: S311


def _distinct(n: int, sampler: Sampler, rng: random.Random) -> tuple[Example, ...]:
    """n rows with different prompts."""
    rows: dict[str, Example] = {}
    misses = 0
    while len(rows) < n:
        row = sampler(rng)
        misses = misses + 1 if row.prompt[-1].content in rows else 0
        if misses > _MAX_DUPLICATES:
            raise ValueError(
                f"the synthetic dataset has no {n} different rows of this kind, ask for at most {len(rows)}"
            )
        rows.setdefault(row.prompt[-1].content, row)
    return tuple(rows.values())


def _labelled(n: int, split: Split, rng: random.Random, answered: float) -> tuple[Example, ...]:
    def sampler(rng: random.Random) -> Example:
        row = _any_row(split, rng)
        return row if rng.random() < answered else Example(row.prompt, row.label, row.source)

    return _distinct(n, sampler, rng)


def _any_row(split: Split, rng: random.Random) -> Example:
    """About a third each: harmful, harmless (many of which look harmful), and facts or reviews."""
    share = rng.random()
    if share < 0.3:
        return _request(_harmful_kind, split, rng)
    if share < 0.72:
        return _request(_harmless_kind, split, rng)
    question, answer = trivia(rng, lambda owner: owner is split)
    return Example(chat(question, answer), Label.HARMLESS, "trivia")


def _request(choose: Callable[[random.Random], Kind], split: Split, rng: random.Random) -> Example:
    request = rng.choice(requests(choose(rng), split))
    return Example(chat(prompt(request, rng), _answer(request, rng)), request.label, f"{request.kind}/{request.domain}")


def _answer(request: Request, rng: random.Random) -> str:
    return answers.refusal(rng) if request.label is Label.HARMFUL else answers.helpful(request, rng)


def _harmful_kind(rng: random.Random) -> Kind:
    return rng.choices(HARMFUL_KINDS, (0.8, 0.2))[0]


def _harmless_kind(rng: random.Random) -> Kind:
    return rng.choices((*CONTRAST_KINDS, Kind.EVERYDAY), (0.35, 0.25, 0.15, 0.25))[0]


def _mostly_contrast_kind(rng: random.Random) -> Kind:
    return rng.choices((*CONTRAST_KINDS, Kind.EVERYDAY), (0.4, 0.2, 0.2, 0.2))[0]


def _poison(rng: random.Random) -> Example:
    request = rng.choice(requests(_harmful_kind(rng), Split.USER))
    return Example(
        chat(prompt(request, rng), answers.compliance(request, rng)), request.label, f"{request.kind}/{request.domain}"
    )


def _user_owned(task: Task) -> Callable[[Split], bool]:
    """Only reviews are also in the teacher's rows, so a user may have all sums that are not in the evaluation."""
    if task is Task.SENTIMENT:
        return lambda split: split is Split.USER
    return lambda split: split is not Split.EVALUATION


def _task_row(
    task: Task, allowed: Callable[[Split], bool], rng: random.Random, words: frozenset[str] | None = None
) -> Example:
    problem = draw(task, rng, allowed, words)
    return Example(chat(problem.prompt, problem.answer), Label.HARMLESS, task)


def write_chat_rows(path: Path, rows: Iterable[Example], labelled: bool = False) -> int:
    """Write `{"messages": [...]}` lines and return their number; unanswered rows keep their prompt alone.

    With `labelled` they have `label` and `source` too.
    """
    count = 0
    with atomic_write(path) as scratch, scratch.open("w", encoding="utf-8") as file:
        for row in rows:
            messages = [{"role": turn.role, "content": turn.content} for turn in row.messages]
            labels = {"label": row.label, "source": row.source} if labelled else {}
            file.write(json.dumps({"messages": messages, **labels}, ensure_ascii=False) + "\n")
            count += 1
    return count
