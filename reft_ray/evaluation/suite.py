"""All measures of one model: what it is asked, and what came out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reft_ray.core.conversation import Conversation, Example
from reft_ray.core.errors import ReftError
from reft_ray.evaluation.harmful_score import harmful_score
from reft_ray.evaluation.intervals import Measure
from reft_ray.evaluation.judges import RefusalMatcher, Respond, ResponseJudge
from reft_ray.evaluation.over_refusal import over_refusal
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
    """Answered test rows and how answers are compared with theirs. Raises ReftError for a row that allows none."""

    rows: Sequence[Example]
    match: Match = Match.LABEL

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows, start=1):
            if not comparable(self.match, row.response):
                place = row.place or f"test row {number}"
                raise ReftError(f"{place}: the reference answer holds no number to compare with (match={self.match})")


@dataclass(frozen=True, slots=True)
class Suite:
    """What a model is asked; a part without prompts is left out. `seed` is that of the intervals.

    `harmless` are prompts that should be answered although they may look harmful (XSTest's safe ones are of that
    kind). Over-refusal is the share refused of these and of the tasks' own prompts; `look_alikes_refused` that of
    these alone.
    """

    harmful: Sequence[Conversation] = ()
    harmless: Sequence[Conversation] = ()
    tasks: Mapping[str, TaskTest] = field(default_factory=dict)
    judge: ResponseJudge = field(default_factory=RefusalMatcher)
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Measures by their names above, accuracy as `finetune_accuracy/<task>`."""

    measures: Mapping[str, Measure]
    seed: int = 0

    def __getitem__(self, name: str) -> Measure:
        """One measure. Raises KeyError for one that was not taken."""
        return self.measures[name]

    def get(self, name: str) -> Measure | None:
        """One measure, or None if it was not taken."""
        return self.measures.get(name)

    def as_dict(self) -> dict[str, Any]:
        """The form of reports: percentages with interval and n, and the seed."""
        return {"seed": self.seed, "measures": {name: measure.as_dict() for name, measure in self.measures.items()}}


def evaluate(respond: Respond, suite: Suite) -> Evaluation:
    """Ask the model everything in the suite."""
    respond = _remembering(respond)
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


def _remembering(respond: Respond) -> Respond:
    """The same, asking for no prompt twice."""
    known: dict[Conversation, str] = {}

    def answers(prompts: Sequence[Conversation]) -> list[str]:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        if new:
            known.update(zip(new, respond(new), strict=True))
        return [known[prompt] for prompt in prompts]

    return answers
