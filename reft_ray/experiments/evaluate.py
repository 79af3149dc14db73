"""One student's figures as reports hold them: percentages with their 95 % intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reft_ray.core.conversation import Example
from reft_ray.evaluation.judges import RefusalMatcher, Respond, ResponseJudge
from reft_ray.evaluation.suite import (
    FINETUNE_ACCURACY,
    HARMFUL_SCORE,
    INCOHERENT,
    LOOK_ALIKES_REFUSED,
    OVER_REFUSAL,
    Suite,
    TaskTest,
    evaluate,
)
from reft_ray.evaluation.task_accuracy import Match

_TASK = "task"


def evaluate_student(
    respond: Respond,
    harmful: Sequence[Example],
    harmless: Sequence[Example],
    task: Sequence[Example],
    match: Match = Match.LABEL,
    judge: ResponseJudge | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The measures of `evaluation.suite` as percentages, with `intervals` beside."""
    suite = Suite(
        harmful=[row.prompt for row in harmful],
        harmless=[row.prompt for row in harmless],
        tasks={_TASK: TaskTest(task, match)},
        judge=judge or RefusalMatcher(),
        seed=seed,
    )
    found = evaluate(respond, suite)
    named = {
        "harmful_score": found[HARMFUL_SCORE],
        "finetune_accuracy": found[f"{FINETUNE_ACCURACY}/{_TASK}"],
        "over_refusal": found[OVER_REFUSAL],
        "look_alikes_refused": found[LOOK_ALIKES_REFUSED],
    }
    return {
        **{name: measure.value for name, measure in named.items()},
        "incoherent": found[INCOHERENT].value,
        "intervals": {name: [measure.low, measure.high] for name, measure in named.items()},
    }
