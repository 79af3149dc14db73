"""The online filter with guards: categories reach the client, and nothing passes when a guard fails."""

import asyncio
import time

import openai
import pytest

from reft_ray.api.filter_app import create_filter_app
from reft_ray.api.guarded import GuardedModerator, LocalGuard
from reft_ray.api.moderator import DeadlineError, GuardError, LocalModerator
from reft_ray.api.settings import FilterSettings
from reft_ray.core.cascade import Combine, Opinion
from reft_ray.core.conversation import chat
from reft_ray.core.errors import ReftError
from reft_ray.core.verdict import Decision
from reft_ray.telemetry import catalog
from reft_ray.telemetry.recorder import MemoryRecorder
from reft_ray.testbed.word_scorer import WordScorer


class WordGuard:
    guard_id = "words"
    threshold = 0.5

    def __init__(self, word="tea", error=None, seconds=0.0):
        self.word, self.error, self.seconds = word, error, seconds

    def opinions(self, conversations):
        time.sleep(self.seconds)
        if self.error:
            raise self.error
        return [
            Opinion(0.75, ("hate", "gossip"), ("hte",)) if self.word in turns[0].content else Opinion(0.25)
            for turns in conversations
        ]


def guarded(*guards, combine=Combine.ANY):
    return GuardedModerator(LocalModerator(WordScorer()), [LocalGuard(guard) for guard in guards], combine)


def judged(moderator, *texts, seconds=5.0):
    rows = [chat(text) for text in texts]
    return asyncio.run(moderator.judge(rows, None, time.monotonic() + seconds))


def test_the_same_rules_as_in_screening():
    batch = judged(guarded(WordGuard()), "tea", "bomb", "milk", "knife")
    assert [verdict.decision for verdict in batch.verdicts] == [
        Decision.BLOCK, Decision.BLOCK, Decision.ALLOW, Decision.REVIEW,
    ]  # fmt: skip
    assert [verdict.decided_by for verdict in batch.verdicts] == ["words", "rt-words", "rt-words", "rt-words"]
    assert batch.policy == batch.verdicts[0].policy != judged(guarded(), "tea").policy
    grey = judged(guarded(WordGuard("knife"), combine=Combine.GREY_BAND), "tea", "knife")
    assert [verdict.decision for verdict in grey.verdicts] == [Decision.ALLOW, Decision.BLOCK]
    info = asyncio.run(guarded(WordGuard()).info())
    assert (info.details["guards"], info.details["policy"]) == ([{"guard_id": "words", "threshold": 0.5}], batch.policy)


@pytest.mark.parametrize("error", [ReftError("down"), RuntimeError("odd")])
def test_a_guard_that_fails_is_an_error_not_a_verdict(error):
    with pytest.raises(GuardError, match="guard words"):
        judged(guarded(WordGuard(error=error)), "milk")
    with pytest.raises(DeadlineError):
        judged(guarded(WordGuard(seconds=0.5)), "milk", seconds=0.05)


def test_the_client_reads_the_guards_categories(live):
    recorder = MemoryRecorder()
    guard = WordGuard()
    app = create_filter_app(guarded(guard), FilterSettings(), recorder=recorder)
    with live(app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        tea, milk = client.moderations.create(input=["tea", "milk"]).results
        guard.error = ReftError("down")
        with pytest.raises(openai.InternalServerError, match="A guard gave no verdict"):
            client.moderations.create(input="milk")
    assert (tea.flagged, tea.categories.hate, tea.category_scores.hate) == (True, True, 0.75)
    assert tea.category_applied_input_types.hate == ["text"]
    assert tea.categories.violence is False
    flagged = {name for name, flag in tea.categories.model_dump(by_alias=True).items() if flag}
    assert flagged == {"harmful", "gossip", "hate"}
    found = tea.model_extra["reft"]
    assert (found["decided_by"], found["hazards"], found["span"]) == ("words", ["hte"], [0, 3])
    assert (milk.flagged, milk.categories.hate) == (False, False)
    assert recorder.total(catalog.FILTER_ERRORS, error_type="guard") == 1
