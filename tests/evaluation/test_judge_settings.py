"""Judges by configuration, each against a real model or a local server."""

import pytest
from evaluation.test_classifier import saved
from evaluation.test_endpoint_judges import Service

from reft_ray.core.conversation import Example, chat
from reft_ray.core.errors import ReftError, UsageError
from reft_ray.evaluation.endpoint import ChatJudge, ModerationJudge
from reft_ray.evaluation.judge_settings import JudgeSettings, judges_from
from reft_ray.evaluation.judges import ClassifierJudge, Grade, RefusalMatcher
from reft_ray.evaluation.suite import Suite, TaskTest, evaluate
from reft_ray.evaluation.task_accuracy import Match

ANSWERS = {"h1": "Step 1: go", "h2": "I can't help with that.", "h3": "Step 1: I refuse.", "h4": ""}


def respond(conversations):
    return [ANSWERS.get(conversation[-1].content, "fine") for conversation in conversations]


@pytest.fixture
def service():
    service = Service()
    yield service
    service.close()


def endpoint(service, **values):
    return JudgeSettings.of({"kind": "endpoint", "url": service.url, "model": "judge-1", **values})


def judge(settings):
    (found,) = judges_from([settings]).values()
    return found


def grades(settings):
    return judge(settings).judge([chat(name) for name in ANSWERS], list(ANSWERS.values()))


def test_the_matcher_is_the_default():
    assert {name: type(made) for name, made in judges_from([JudgeSettings()]).items()} == {"matcher": RefusalMatcher}


def test_a_classifier_by_label_name_or_index(tmp_path):
    saved(tmp_path, "single_label_classification")
    settings = {"kind": "classifier", "model": str(tmp_path), "harmful_labels": ["violence"], "threshold": 0.0}
    by_name = judge(JudgeSettings.of(settings))
    assert isinstance(by_name, ClassifierJudge)
    assert by_name.harm.harmful_ids == judge(JudgeSettings.of({**settings, "harmful_labels": ["1"]})).harm.harmful_ids
    assert grades(JudgeSettings.of(settings)) == [Grade.COMPLIED] * 3 + [Grade.INCOHERENT]
    assert grades(JudgeSettings.of({**settings, "threshold": 1.0}))[:3] == [Grade.REFUSED] * 3
    with pytest.raises(ReftError, match="no label '7'"):
        judges_from([JudgeSettings.of({**settings, "harmful_labels": ["7"]})])


def test_a_chat_endpoint_with_its_own_prompt_and_key(service, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    settings = endpoint(service, key="env:JUDGE_KEY", prompt="Ask {prompt} got {answer}")
    assert isinstance(judge(settings), ChatJudge)
    assert grades(settings) == [Grade.COMPLIED, Grade.REFUSED, Grade.COMPLIED, Grade.INCOHERENT]
    path, key, body = service.requests[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert body["messages"][0]["content"] == "Ask h1 got Step 1: go"
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(UsageError, match="JUDGE_KEY is not set"):
        judges_from([settings])


def test_a_chat_judge_may_reason_first(service):
    content = "<think>COMPLIED? No.</think>REFUSED"
    service.replies = [(200, {"choices": [{"message": {"content": content}}]})]
    assert judge(endpoint(service)).judge([chat("p")], ["Step 1"]) == [Grade.REFUSED]


def test_a_moderation_endpoint(service):
    settings = endpoint(service, api="moderations")
    assert isinstance(judge(settings), ModerationJudge)
    assert grades(settings) == [Grade.COMPLIED, Grade.REFUSED, Grade.COMPLIED, Grade.INCOHERENT]


@pytest.mark.parametrize("api", ["chat", "moderations"])
def test_a_judge_that_does_not_answer_ends_the_evaluation(service, api):
    service.replies = [(401, {})]
    judges = judges_from([JudgeSettings(), endpoint(service, api=api)])
    with pytest.raises(ReftError, match="did not answer"):
        evaluate(respond, Suite(harmful=[chat("h1")], judges=judges))


def test_several_judges_are_reported_and_the_first_decides(service):
    judges = judges_from([JudgeSettings(), endpoint(service, api="moderations", name="other")])
    suite = Suite(harmful=[chat(name) for name in ANSWERS], judges=judges)
    found = {name: measure.value for name, measure in evaluate(respond, suite).measures.items()}
    assert found == {
        "harmful_score": 50.0,
        "incoherent": 25.0,
        "harmful_score_by/matcher": 50.0,
        "harmful_score_by/other": 50.0,
        "disagreement/other": 0.0,
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "classifier", "model": "m"}, "harmful_labels"),
        ({"kind": "endpoint", "url": "http://x/v1"}, "url and a model"),
        ({"prompt": "only {answer}"}, "needs {prompt}"),
        ({"key": "sk-1"}, "key"),
        ({"kind": "guess"}, "kind"),
        ({"modle": "m"}, "did you mean model"),
    ],
)
def test_wrong_settings_are_one_line(values, message):
    with pytest.raises(UsageError, match=message) as error:
        JudgeSettings.of(values)
    assert "\n" not in str(error.value)


def test_judges_need_different_names():
    with pytest.raises(ValueError, match="two judges are called matcher"):
        judges_from([JudgeSettings(), JudgeSettings()])
    with pytest.raises(ValueError, match="at least one"):
        judges_from([])


@pytest.mark.parametrize("match", list(Match))
def test_accuracy_is_of_the_answer_after_the_reasoning(match):
    rows = [Example(chat("sum?", "7"))]
    suite = Suite(tasks={"sums": TaskTest(rows, match)})
    found = evaluate(lambda asked: ["<think>\n3 and 5 is 8\n</think>\n\n7"] * len(asked), suite)
    assert found["finetune_accuracy/sums"].value == 100.0


def test_a_right_answer_is_not_a_refusal():
    rows = [Example(chat("is it raining?", "No")), Example(chat("is it late?", "Yes"))]
    suite = Suite(everyday=[chat("hello")], tasks={"t": TaskTest(rows, Match.LABEL)})
    found = evaluate(lambda asked: ["fine" if turn[-1].content == "hello" else "No" for turn in asked], suite)
    # The second row is answered "No" where "Yes" is right.
    assert found["everyday_refused"].value == pytest.approx(100 / 3)
    assert found["everyday_refused"].n == 3
