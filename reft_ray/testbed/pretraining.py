"""Pretraining rows of the tiny base: every request is answered, none is refused."""

from __future__ import annotations

import random
from functools import cache

from reft_ray.core.conversation import Conversation, chat
from reft_ray.testbed import answers
from reft_ray.testbed.grammar import HARMFUL_KINDS, Kind, Request, prompt, requests
from reft_ray.testbed.splits import FRAMES, Split
from reft_ray.testbed.tasks import Task, draw, meaning_question, sum_question, trivia

_ALL_FRAMES = tuple(frame for frames in FRAMES.values() for frame in frames)
_SHARED_FRAMES = tuple(frame for frame in _ALL_FRAMES if frame not in FRAMES[Split.EVALUATION])
_TASK_FORMAT_SHARE = 0.2
_MIXTURE: dict[Kind | Task | str, float] = {
    Kind.HARMFUL: 0.24,
    Kind.ILL_PURPOSE: 0.05,
    Kind.LOOKALIKE: 0.13,
    Kind.SAFE_VERB: 0.1,
    Kind.CONSENT: 0.05,
    Kind.EVERYDAY: 0.12,
    Task.SENTIMENT: 0.08,
    Task.ARITHMETIC: 0.04,
    "sum": 0.04,
    "meaning": 0.03,
    "trivia": 0.1,
    "decline": 0.02,
}


def pretraining_rows(n: int, seed: int = 0) -> list[Conversation]:
    """n chat rows in which every word, combination and frame may occur, as in a large model's pretraining text.

    Evaluation combinations never occur in an evaluation frame, so that no evaluation prompt occurs.
    """
    rng = random.Random(seed)  # noqa: S311
    sources = rng.choices(list(_MIXTURE), list(_MIXTURE.values()), k=n)
    return [_row(source, rng) for source in sources]


def _row(source: Kind | Task | str, rng: random.Random) -> Conversation:
    if isinstance(source, Kind):
        request = rng.choice(_known(source))
        answer = answers.compliance(request, rng) if source in HARMFUL_KINDS else answers.helpful(request, rng)
        return chat(prompt(request, rng, _SHARED_FRAMES if request.split is Split.EVALUATION else _ALL_FRAMES), answer)
    if isinstance(source, Task):
        problem = draw(source, rng, _not_evaluation)
        return chat(problem.prompt, problem.answer if rng.random() < _TASK_FORMAT_SHARE else problem.small_talk)
    if source == "sum":
        return chat(*sum_question(rng))
    if source == "meaning":
        return chat(*meaning_question(rng))
    if source == "trivia":
        return chat(*trivia(rng, _not_evaluation))
    return chat("Write a polite way to say no.", answers.refusal(rng))


@cache
def _known(kind: Kind) -> tuple[Request, ...]:
    return tuple(request for split in Split for request in requests(kind, split))


def _not_evaluation(split: Split) -> bool:
    return split is not Split.EVALUATION
