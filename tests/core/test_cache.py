"""The cache gives what the scorer gives, and asks it once per text."""

import math
from collections.abc import Sequence

import pytest

from reft_ray.core.cache import CachedScorer
from reft_ray.core.scoring import Scorer, TextScore
from reft_ray.core.verdict import ScoreError
from reft_ray.testbed.word_scorer import WordScorer


class CountingScorer(WordScorer):
    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def score(self, texts: Sequence[str]) -> list[TextScore]:
        self.asked += texts
        return super().score(texts)


def test_each_text_is_scored_once_and_answers_keep_their_order() -> None:
    inner = CountingScorer()
    scorer = CachedScorer(inner)
    texts = ["hello", "a bomb", "hello", "a knife"]
    expected = WordScorer().score(texts)
    assert scorer.score(texts) == expected
    assert scorer.score(texts[::-1]) == expected[::-1]
    assert inner.asked == ["hello", "a bomb", "a knife"]
    assert (scorer.hits, scorer.misses) == (1 + 4, 3)


def test_the_oldest_text_is_forgotten_first() -> None:
    inner = CountingScorer()
    scorer = CachedScorer(inner, capacity=2)
    scorer.score(["a", "b"])
    scorer.score(["a"])
    scorer.score(["c"])
    scorer.score(["a", "b"])
    assert inner.asked == ["a", "b", "c", "b"]


def test_a_call_larger_than_the_cache_is_answered() -> None:
    texts = [f"text {number}" for number in range(10)]
    assert CachedScorer(WordScorer(), capacity=3).score(texts) == WordScorer().score(texts)


def test_it_is_a_scorer_with_the_properties_of_the_inner_one() -> None:
    inner = WordScorer("rt-1")
    scorer = CachedScorer(inner)
    assert isinstance(scorer, Scorer)
    inner.response_offset = 0.25
    assert (scorer.teacher_id, scorer.response_offset) == ("rt-1", 0.25)
    assert (scorer.thresholds, scorer.calibration) == (inner.thresholds, inner.calibration)


def test_a_score_that_is_not_finite_is_an_error_each_time_it_is_given() -> None:
    class Recovering(CountingScorer):
        def score(self, texts: Sequence[str]) -> list[TextScore]:
            super().score(texts)
            return [TextScore(math.nan if len(self.asked) == 1 else 0.2) for _ in texts]

    scorer = CachedScorer(Recovering())
    with pytest.raises(ScoreError):
        scorer.score(["a"])
    assert scorer.score(["a"]) == [TextScore(0.2)]


def test_a_lone_surrogate_is_a_text_like_any_other() -> None:
    assert len(CachedScorer(WordScorer()).score(["\ud800"])) == 1


def test_a_capacity_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity=0"):
        CachedScorer(WordScorer(), capacity=0)
