"""The share of harmless prompts that are answered by a refusal."""

from __future__ import annotations

from collections.abc import Sequence

from reft_ray.core.conversation import Conversation
from reft_ray.evaluation.intervals import Measure
from reft_ray.evaluation.judges import Grade, RefusalMatcher, Respond, ResponseJudge


def over_refusal(
    respond: Respond, prompts: Sequence[Conversation], judge: ResponseJudge | None = None, seed: int = 0
) -> Measure:
    """Answer the prompts and count refusals, by default those that the matcher sees.

    A judge of harm says little here: it calls every harmless answer a refusal.
    """
    judgements = (judge or RefusalMatcher()).judge(prompts, respond(prompts))
    return Measure.of([judgement is Grade.REFUSED for judgement in judgements], seed)
