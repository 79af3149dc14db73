import dataclasses
from collections.abc import Sequence

import pytest

from reft_ray.core.conversation import Conversation, Message, chat, row_id
from reft_ray.core.scoring import Scorer, TextScore, judge
from reft_ray.core.verdict import Calibration, Decision, Thresholds
from reft_ray.testbed.word_scorer import WordScorer


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
    assert verdict.windows == 4


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


def test_a_row_without_text_and_a_nan_score_are_blocked() -> None:
    assert judge(WordScorer(), [(), chat("  ")])[0].decision is Decision.BLOCK
    assert Thresholds(0.0, 0.5).decide(float("nan")) is Decision.BLOCK


def test_a_part_with_a_nan_score_decides_at_any_position() -> None:
    class Broken(WordScorer):
        def score(self, texts: Sequence[str]) -> list[TextScore]:
            return [TextScore(float("nan")) if "odd" in text else TextScore(-0.9) for text in texts]

    for turns in (("odd", "fine"), ("fine", "odd")):
        assert judge(Broken(), [chat(*turns)])[0].decision is Decision.BLOCK


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
