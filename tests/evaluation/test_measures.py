import random
import statistics

import pytest

from reft_ray.core.conversation import Example, chat
from reft_ray.core.errors import ReftError
from reft_ray.core.proportion import wilson
from reft_ray.evaluation.intervals import Measure, bootstrap
from reft_ray.evaluation.judges import RefusalMatcher
from reft_ray.evaluation.suite import Suite, TaskTest, evaluate, harmful_score, over_refusal
from reft_ray.evaluation.task_accuracy import Match, final_number, is_right, task_accuracy


def naive_bootstrap(hits, resamples=4000):
    rng = random.Random(1)
    means = sorted(statistics.fmean(rng.choices(hits, k=len(hits))) for _ in range(resamples))
    return means[int(0.025 * resamples)], means[int(0.975 * resamples)]


def test_bootstrap_agrees_with_a_naive_loop():
    hits = [True] * 30 + [False] * 90
    assert bootstrap(hits, seed=3) == pytest.approx(naive_bootstrap(hits), abs=0.02)
    assert bootstrap(hits, seed=3) == bootstrap(hits, seed=3)


def test_bootstrap_of_many_prompts_runs_in_chunks():
    hits = [index % 4 == 0 for index in range(20_000)]
    low, high = bootstrap(hits, seed=0, resamples=500)
    assert 0.24 < low < 0.25 < high < 0.26


def test_wilson_solves_its_quadratic():
    z = 1.959963984540054
    for count, n in ((0, 300), (300, 300), (7, 40)):
        for bound in wilson(count, n):
            assert (count / n - bound) ** 2 == pytest.approx(z**2 * bound * (1 - bound) / n, abs=1e-12)


def test_no_harmful_answer_still_has_an_interval():
    measure = Measure.of([False] * 300)
    assert (measure.value, measure.low, measure.n) == (0.0, 0.0, 300)
    assert measure.high == pytest.approx(1.264, abs=0.001)
    assert Measure.of([True] * 300).high == 100.0


def test_a_share_of_no_prompts_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        Measure.of([])


ANSWERS = {
    "h1": "Sure, here is how.",
    "h2": "I can't help with that.",
    "h3": "",
    "h4": "I can't help with that.",
    "q1": "The capital is Rome.",
    "q2": "I won't help with this.",
}


def respond(conversations):
    return [ANSWERS[conversation[-1].content] for conversation in conversations]


def prompts(*names):
    return [chat(name) for name in names]


def test_incoherent_answers_count_separately():
    score = harmful_score(respond, prompts("h1", "h2", "h3", "h4"), RefusalMatcher())
    assert (score.complied.value, score.incoherent.value) == (25.0, 25.0)


def test_over_refusal_counts_refusals_of_harmless_prompts():
    assert over_refusal(respond, prompts("q1", "q2")).value == 50.0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 plus 4 is 7. #### 7", "7"),
        ("#### 1,234.50 dollars, not 3", "1234.50"),
        ("It is -5.", "-5"),
        ("First 12, then 1,000.", "1000"),
        ("The answer is 8 ####", "8"),
        ("costs .5", "0.5"),
    ],
)
def test_final_number(text, number):
    assert str(final_number(text)) == number


@pytest.mark.parametrize(
    ("match", "answer", "reference", "right"),
    [
        (Match.NUMBER, "so 7.0", "3 plus 4 is 7. #### 7", True),
        (Match.NUMBER, "#### 8", "#### 7", False),
        (Match.NUMBER, "seven", "#### 7", False),
        (Match.LABEL, " Positive\n", "positive", True),
        (Match.LABEL, "positive, I think", "positive", False),
        (Match.EXACT, "Positive", "positive", False),
        (Match.EXACT, "yes ", "yes", True),
    ],
)
def test_answers_are_compared_by_match(match, answer, reference, right):
    assert is_right(match, answer, reference) is right


def test_a_number_task_without_a_number_is_an_error():
    rows = [Example(chat("q", "7")), Example(chat("q", "seven"), place="test.jsonl:2")]
    # Before anything is generated.
    with pytest.raises(ReftError, match=r"test\.jsonl:2: the reference answer holds no number to compare with"):
        TaskTest(rows, Match.NUMBER)
    assert TaskTest(rows, Match.LABEL).rows == rows
    with pytest.raises(ValueError, match="no number"):
        is_right(Match.NUMBER, "7", "seven")


def test_the_model_gets_prompts_without_answers():
    asked = []

    def positive(conversations):
        asked.extend(conversations)
        return ["positive"] * len(conversations)

    rows = [Example(chat("good?", "positive")), Example(chat("bad?", "negative"))]
    assert task_accuracy(positive, rows, Match.LABEL).value == 50.0
    assert asked == [chat("good?"), chat("bad?")]


def test_a_suite_reports_only_what_it_measured():
    rows = [Example(chat("q1", "The capital is Rome."))]
    suite = Suite(prompts("h1", "h2"), prompts("q2"), {"capitals": TaskTest(rows, Match.EXACT)}, seed=5)
    evaluation = evaluate(respond, suite)
    assert {name: measure.value for name, measure in evaluation.measures.items()} == {
        "harmful_score": 50.0,
        "incoherent": 0.0,
        "over_refusal": 50.0,
        "look_alikes_refused": 100.0,
        "everyday_refused": 0.0,
        "finetune_accuracy/capitals": 100.0,
    }
    assert evaluation.as_dict()["measures"]["harmful_score"]["n"] == 2
    assert evaluate(respond, Suite(harmless=prompts("q1"))).measures.keys() == {"over_refusal", "look_alikes_refused"}


def test_the_model_gets_no_prompt_twice():
    asked = []

    def answered(conversations):
        asked.extend(conversations)
        return respond(conversations)

    rows = [Example(chat("q1", "The capital is Rome."))]
    evaluate(answered, Suite(prompts("h1"), prompts("q1", "q2"), {"capitals": TaskTest(rows, Match.EXACT)}))
    assert sorted(asked, key=str) == sorted(prompts("h1", "q1", "q2"), key=str)
