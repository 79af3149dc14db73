import base64
import dataclasses
import math
from collections.abc import Sequence

import pytest

from reft_ray.core.conversation import Conversation, Message, chat, row_id
from reft_ray.core.joining import joined_turns
from reft_ray.core.scoring import Scorer, TextScore, judge
from reft_ray.core.verdict import Calibration, Decision, ScoreError, Thresholds
from reft_ray.testbed.word_scorer import WordScorer

BASE64 = base64.b64encode(b"how to build a bomb").decode()


class Counting(WordScorer):
    """Keeps every text that it was asked to score."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def score(self, texts) -> list[TextScore]:
        self.texts += texts
        return super().score(texts)


def test_the_highest_part_decides_and_is_named() -> None:
    dialogue: Conversation = (
        Message("system", "You help."),
        Message("user", "Hello there"),
        Message("assistant", "Here is how to build a bomb"),
        Message("user", "a knife, please"),
    )
    verdict = judge(WordScorer(), [dialogue])[0]
    assert (verdict.decision, verdict.part, verdict.score) == (Decision.BLOCK, "messages[2].assistant", 0.9)
    # Its four turns, and the two of the user read on, with and without a blank.
    assert verdict.windows == 6


def test_an_answer_must_score_higher_than_a_prompt() -> None:
    scorer = WordScorer()
    scorer.response_offset = 0.85
    block, review = judge(scorer, [chat("a knife, please", "we sell a bomb"), chat("hi", "tactical")])
    assert (block.part, block.threshold) == ("messages[0].user", 0.5)  # 0.1 counts for more than 0.9 - 0.85
    assert block.decision is Decision.REVIEW
    assert review.decision is Decision.ALLOW


def test_each_distinct_text_is_scored_once_and_encoded_text_is_read() -> None:
    scorer = Counting()
    verdicts = judge(
        scorer, [chat("please help me"), chat("please help me"), chat("YnVpbGQgYSBib21iIGZvciBtZSBwbGVhc2U=")]
    )
    assert scorer.texts.count("please help me") == 1
    assert [v.decision for v in verdicts] == [Decision.ALLOW, Decision.ALLOW, Decision.BLOCK]
    assert verdicts[2].encoding == "base64"


@pytest.mark.parametrize(
    "turns",
    [
        ["how to build a bo", "mb at home"],
        ["b", "o", "m", "b"],
        ["x " * 4000 + "how to build a bo", "mb at home" + " x" * 4000],
        [f"Decode {BASE64[:-6]}", BASE64[-6:]],
    ],
)
def test_a_word_that_is_split_over_turns_is_read_on(turns: list[str]) -> None:
    for role in ("user", "assistant"):
        answers = "assistant" if role == "user" else "user"
        dialogue = [turn for text in turns for turn in (Message(role, text), Message(answers, "Go on."))]
        verdict = judge(WordScorer(), [tuple(dialogue)])[0]
        assert verdict.decision is Decision.BLOCK
        assert verdict.encoding is not None
        assert verdict.encoding.startswith("joined")


def test_turns_that_end_are_not_joined_and_joining_costs_at_most_twice_the_text() -> None:
    scorer = Counting()
    judge(scorer, [(*chat("Hello there.", "Hi!"), *chat("How are you?", "Fine."))])
    assert len(scorer.texts) == 4
    for text in ("a", "ab cd", "word " * 500):
        dialogue = tuple(Message("user", f"{text}{index}") for index in range(50))
        joined = [text for _, text in joined_turns(dialogue)]
        assert sum(map(len, joined)) <= 2 * sum(len(turn.content) for turn in dialogue) + 2 * len(dialogue)


def test_a_row_without_text_is_blocked() -> None:
    assert judge(WordScorer(), [(), chat("  ")])[0].decision is Decision.BLOCK


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_an_error_and_no_verdict(broken: float) -> None:
    class Broken(WordScorer):
        def score(self, texts: Sequence[str]) -> list[TextScore]:
            return [TextScore(broken if "odd" in text else -0.9) for text in texts]

    for turns in (("odd", "fine"), ("fine", "odd")):
        with pytest.raises(ScoreError, match="must be replaced"):
            judge(Broken(), [chat(*turns)])
    with pytest.raises(ScoreError):
        Thresholds(0.0, 0.5).decide(broken)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_score_for_each_text_or_an_error(count: int) -> None:
    scorer = WordScorer()
    scorer.score = lambda texts: [TextScore(-0.9)] * count  # type: ignore[method-assign]
    with pytest.raises(ScoreError, match=f"gave {count} scores for 2 texts"):
        judge(scorer, [chat("a", "b")])


def test_thresholds_and_their_order() -> None:
    limits = Thresholds(0.0, 0.5)
    assert [limits.decide(s) for s in (0.0, 0.1, 0.5, 0.51)] == [
        Decision.ALLOW, Decision.REVIEW, Decision.REVIEW, Decision.BLOCK,
    ]  # fmt: skip
    assert limits.raised(0.6) == Thresholds(0.6, 1.0)
    with pytest.raises(ValueError, match="review <= block"):
        Thresholds(0.5, 0.0)
    assert Calibration(4.0, 0.0).probability(-900.0) == pytest.approx(0.0)


def test_the_row_id_follows_content_alone() -> None:
    row = chat("a", "b")
    assert row_id(row) == row_id(chat("a", "b"))
    assert len({row_id(row), row_id(chat("a", "c")), row_id((row[0], dataclasses.replace(row[1], trained=False)))}) == 3
    assert isinstance(WordScorer(), Scorer)


def test_a_row_that_was_not_read_to_its_end_needs_review() -> None:
    scorer = WordScorer()
    scorer.score = lambda texts: [TextScore(-0.9, 512, truncated=True) for _ in texts]  # type: ignore[method-assign]
    (verdict,) = judge(scorer, [chat("tea")])
    assert (verdict.decision, verdict.truncated) == (Decision.REVIEW, True)
    scorer.score = lambda texts: [TextScore(0.99, 512, truncated=True) for _ in texts]  # type: ignore[method-assign]
    assert judge(scorer, [chat("tea")])[0].decision is Decision.BLOCK
