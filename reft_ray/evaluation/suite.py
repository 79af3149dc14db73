"""The evaluation suite of a model: harmful score, over-refusal and task accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reft_ray.core.conversation import Conversation, Example
from reft_ray.core.errors import ReftError
from reft_ray.evaluation.intervals import Measure
from reft_ray.evaluation.judges import Grade, RefusalMatcher, Respond, ResponseJudge
from reft_ray.evaluation.task_accuracy import Match, comparable, task_accuracy

HARMFUL_SCORE, INCOHERENT, OVER_REFUSAL, LOOK_ALIKES_REFUSED, FINETUNE_ACCURACY = (
    "harmful_score",
    "incoherent",
    "over_refusal",
    "look_alikes_refused",
    "finetune_accuracy",
)


@dataclass(frozen=True, slots=True)
class TaskTest:
    """Answered test rows and how answers are compared. Raises ReftError for a row without a comparable answer."""

    rows: Sequence[Example]
    match: Match = Match.LABEL

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows, start=1):
            if not comparable(self.match, row.response):
                place = row.place or f"test row {number}"
                raise ReftError(f"{place}: the reference answer holds no number to compare with (match={self.match})")


@dataclass(frozen=True, slots=True)
class Suite:
    """The prompts of each measure; a part without prompts is not measured. `seed` is that of the intervals.

    `harmless` prompts should be answered although they may look harmful (such as XSTest's safe ones). Over-refusal is
    the share refused of these and the tasks' prompts; `look_alikes_refused` that of these alone.
    """

    harmful: Sequence[Conversation] = ()
    harmless: Sequence[Conversation] = ()
    tasks: Mapping[str, TaskTest] = field(default_factory=dict)
    judge: ResponseJudge = field(default_factory=RefusalMatcher)
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Measures by name; accuracy is `finetune_accuracy/<task>`."""

    measures: Mapping[str, Measure]
    seed: int = 0

    def __getitem__(self, name: str) -> Measure:
        """One measure. Raises KeyError if it was not measured."""
        return self.measures[name]

    def get(self, name: str) -> Measure | None:
        """One measure, or None if it was not measured."""
        return self.measures.get(name)

    def as_dict(self) -> dict[str, Any]:
        """The JSON of reports: percentages with interval and n, and the seed."""
        return {"seed": self.seed, "measures": {name: measure.as_dict() for name, measure in self.measures.items()}}


@dataclass(frozen=True, slots=True)
class HarmfulScore:
    """HS: the share of all prompts whose answer complies; incoherent answers count separately, not as safe."""

    complied: Measure
    incoherent: Measure


def harmful_score(
    respond: Respond, prompts: Sequence[Conversation], judge: ResponseJudge, seed: int = 0
) -> HarmfulScore:
    """Answer the prompts and judge the answers."""
    grades = judge.judge(prompts, respond(prompts))
    return HarmfulScore(
        complied=Measure.of([grade is Grade.COMPLIED for grade in grades], seed),
        incoherent=Measure.of([grade is Grade.INCOHERENT for grade in grades], seed),
    )


def over_refusal(
    respond: Respond, prompts: Sequence[Conversation], judge: ResponseJudge | None = None, seed: int = 0
) -> Measure:
    """The share of harmless prompts that are refused, by default as the refusal matcher sees it.

    A judge of harm does not measure this: it calls every harmless answer a refusal.
    """
    grades = (judge or RefusalMatcher()).judge(prompts, respond(prompts))
    return Measure.of([grade is Grade.REFUSED for grade in grades], seed)


def evaluate(respond: Respond, suite: Suite) -> Evaluation:
    """Measure everything in the suite."""
    respond = _memoized(respond)
    measures: dict[str, Measure] = {}
    if suite.harmful:
        harm = harmful_score(respond, suite.harmful, suite.judge, suite.seed)
        measures |= {HARMFUL_SCORE: harm.complied, INCOHERENT: harm.incoherent}
    if suite.harmless:
        measures[LOOK_ALIKES_REFUSED] = over_refusal(respond, suite.harmless, seed=suite.seed)
        asked = [row.prompt for task in suite.tasks.values() for row in task.rows]
        measures[OVER_REFUSAL] = over_refusal(respond, [*suite.harmless, *asked], seed=suite.seed)
    for name, task in suite.tasks.items():
        measures[f"{FINETUNE_ACCURACY}/{name}"] = task_accuracy(respond, task.rows, task.match, suite.seed)
    return Evaluation(measures, suite.seed)


def _memoized(respond: Respond) -> Respond:
    """The same model, called once per distinct prompt."""
    known: dict[Conversation, str] = {}

    def answers(prompts: Sequence[Conversation]) -> list[str]:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        if new:
            known.update(zip(new, respond(new), strict=True))
        return [known[prompt] for prompt in prompts]

    return answers
