"""The evaluation suite of a model: harmful score, over-refusal and task accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reft_ray.core.conversation import Conversation, Example
from reft_ray.core.errors import ReftError
from reft_ray.evaluation.intervals import Measure
from reft_ray.evaluation.judges import Grade, RefusalMatcher, Respond, ResponseJudge
from reft_ray.evaluation.task_accuracy import Match, comparable, is_right, task_accuracy

HARMFUL_SCORE = "harmful_score"
INCOHERENT = "incoherent"
OVER_REFUSAL = "over_refusal"
LOOK_ALIKES_REFUSED = "look_alikes_refused"
EVERYDAY_REFUSED = "everyday_refused"
FINETUNE_ACCURACY = "finetune_accuracy"
SCORE_IN = "harmful_score_in"
"""The harmful score of each category of harmful prompts, `harmful_score_in/<category>`."""
SCORE_BY = "harmful_score_by"
"""With several judges: the harmful score by each one, `harmful_score_by/<judge>`."""
DISAGREEMENT = "disagreement"
"""With several judges: the share of harmful prompts that a judge grades unlike the first, `disagreement/<judge>`."""


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

    `harmless` prompts should be answered although they may look harmful (such as XSTest's safe ones), `everyday`
    prompts look harmless. Over-refusal is the share refused of these and the tasks' prompts; `look_alikes_refused` that
    of the first alone, `everyday_refused` that of the others. Of several `judges` the first decides. `categories`,
    where given, has the category of each harmful prompt, "" for none.
    """

    harmful: Sequence[Conversation] = ()
    harmless: Sequence[Conversation] = ()
    tasks: Mapping[str, TaskTest] = field(default_factory=dict)
    judges: Mapping[str, ResponseJudge] = field(default_factory=lambda: {"matcher": RefusalMatcher()})
    seed: int = 0
    everyday: Sequence[Conversation] = ()
    categories: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.categories and len(self.categories) != len(self.harmful):
            raise ValueError(f"{len(self.harmful)} harmful prompts, {len(self.categories)} categories")


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

    @classmethod
    def of(cls, grades: Sequence[Grade], seed: int = 0) -> HarmfulScore:
        """From the grades of the answers to harmful prompts."""
        complied, incoherent = ([grade is kind for grade in grades] for kind in (Grade.COMPLIED, Grade.INCOHERENT))
        return cls(Measure.of(complied, seed), Measure.of(incoherent, seed))


def harmful_score(
    respond: Respond, prompts: Sequence[Conversation], judge: ResponseJudge, seed: int = 0
) -> HarmfulScore:
    """Answer the prompts and judge the answers."""
    return HarmfulScore.of(judge.judge(prompts, respond(prompts)), seed)


def over_refusal(
    respond: Respond, prompts: Sequence[Conversation], judge: ResponseJudge | None = None, seed: int = 0
) -> Measure:
    """The share of harmless prompts that are refused, by default as the refusal matcher sees it.

    A judge of harm does not measure this: it calls every harmless answer a refusal.
    """
    return Measure.of(_refused(respond, prompts, judge), seed)


def evaluate(respond: Respond, suite: Suite) -> Evaluation:
    """Measure everything in the suite. A judge that does not answer is a ReftError of the whole evaluation."""
    respond = _memoized(respond)
    measures: dict[str, Measure] = {}
    if suite.harmful:
        measures |= _harm(respond, suite)
    everyday = [*_refused(respond, suite.everyday), *_tasks_refused(respond, suite)]
    look_alikes = _refused(respond, suite.harmless)
    if look_alikes or suite.everyday:
        measures[OVER_REFUSAL] = Measure.of([*look_alikes, *everyday], suite.seed)
    if look_alikes:
        measures[LOOK_ALIKES_REFUSED] = Measure.of(look_alikes, suite.seed)
    if everyday:
        measures[EVERYDAY_REFUSED] = Measure.of(everyday, suite.seed)
    for name, task in suite.tasks.items():
        measures[f"{FINETUNE_ACCURACY}/{name}"] = task_accuracy(respond, task.rows, task.match, suite.seed)
    return Evaluation(measures, suite.seed)


def _harm(respond: Respond, suite: Suite) -> dict[str, Measure]:
    answers = respond(suite.harmful)
    grades = {name: judge.judge(suite.harmful, answers) for name, judge in suite.judges.items()}
    first, *others = grades
    score = HarmfulScore.of(grades[first], suite.seed)
    measures = {HARMFUL_SCORE: score.complied, INCOHERENT: score.incoherent}
    for category in dict.fromkeys(filter(None, suite.categories)):
        own = [grade for grade, name in zip(grades[first], suite.categories, strict=True) if name == category]
        measures[f"{SCORE_IN}/{category}"] = HarmfulScore.of(own, suite.seed).complied
    if others:
        for name, found in grades.items():
            measures[f"{SCORE_BY}/{name}"] = HarmfulScore.of(found, suite.seed).complied
    for name in others:
        differs = [one is not other for one, other in zip(grades[first], grades[name], strict=True)]
        measures[f"{DISAGREEMENT}/{name}"] = Measure.of(differs, suite.seed)
    return measures


def _refused(respond: Respond, prompts: Sequence[Conversation], judge: ResponseJudge | None = None) -> list[bool]:
    grades = (judge or RefusalMatcher()).judge(prompts, respond(prompts)) if prompts else []
    return [grade is Grade.REFUSED for grade in grades]


def _tasks_refused(respond: Respond, suite: Suite) -> list[bool]:
    """Whether each task row was refused; a right answer was not, also where it is `No`."""
    refused: list[bool] = []
    for task in suite.tasks.values():
        prompts = [row.prompt for row in task.rows]
        for row, answer, no in zip(task.rows, respond(prompts), _refused(respond, prompts), strict=True):
            refused.append(no and not is_right(task.match, answer, row.response))
    return refused


def _memoized(respond: Respond) -> Respond:
    """The same model, called once per distinct prompt."""
    known: dict[Conversation, str] = {}

    def answers(prompts: Sequence[Conversation]) -> list[str]:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        if new:
            known.update(zip(new, respond(new), strict=True))
        return [known[prompt] for prompt in prompts]

    return answers
