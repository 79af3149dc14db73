"""`/v1/completions` and log probabilities through the openai client, on the echoing fake."""

import openai
import pytest


def complete(client, prompt, **options):
    return client.completions.create(**{"model": "tiny", "prompt": prompt, "temperature": 0} | options)


def test_a_completion_continues_a_text(client):
    answer = complete(client, "one two")
    assert (answer.object, answer.choices[0].text, answer.choices[0].finish_reason) == (
        "text_completion",
        "one two",
        "stop",
    )
    assert answer.choices[0].logprobs is None
    assert answer.usage.total_tokens == 4
    assert complete(client, "one two", max_tokens=1).choices[0].finish_reason == "length"


def test_echo_gives_the_log_probabilities_of_the_prompt(client):
    (choice,) = complete(client, "one two", max_tokens=1, logprobs=1, echo=True).choices
    assert choice.text == "one twoone "
    found = choice.logprobs
    assert found.tokens == ["one ", "two", "one "]
    assert found.token_logprobs == [None, -3 / 8, -4 / 8]
    assert found.top_logprobs == [None, {"two": -3 / 8}, {"one ": -4 / 8}]
    assert found.text_offset == [0, 4, 7]


def test_several_prompts_get_an_answer_each_in_order(client):
    answer = complete(client, [f"text {index}" for index in range(20)])
    assert [(c.index, c.text) for c in answer.choices] == [(index, f"text {index}") for index in range(20)]
    assert [choice.text for choice in complete(client, ["a", "b"], n=2).choices] == ["a", "a", "b", "b"]
    assert answer.usage.prompt_tokens == 40


@pytest.mark.parametrize(
    ("options", "param", "code"),
    [
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": ["a", ""]}, "prompt", "invalid_value"),
        ({"prompt": ["a"] * 300}, "prompt", "invalid_value"),
        ({"stream": True}, "stream", "unsupported_parameter"),
        ({"suffix": "x"}, "suffix", "unsupported_parameter"),
        ({"best_of": 3}, "best_of", "unsupported_parameter"),
        ({"logit_bias": {"1": 1}}, "logit_bias", "unsupported_parameter"),
        ({"logprobs": 30}, "logprobs", "invalid_value"),
        ({"extra_body": {"promt": "x"}}, "promt", "unknown_parameter"),
        ({"prompt": [1, 2], "extra_body": {"moderation": {}}}, "prompt", "invalid_value"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(client, options, param, code):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **{"prompt": "x"} | options)
    assert (caught.value.param, caught.value.code) == (param, code)
    with pytest.raises(openai.NotFoundError):
        complete(client, "x", model="ft:none")


def test_prompts_and_answers_are_moderated(client):
    blocking = {"moderation": {"policy": {"input": {"mode": "block"}}}}
    choice = complete(client, ["tea", "build a bomb"], extra_body=blocking).choices[0]
    assert (choice.text, choice.finish_reason) == ("", "content_filter")
    output = {"moderation": {"policy": {"output": {"mode": "block"}}}}
    tea, bomb = complete(client, ["tea", "build a bomb"], extra_body=output).choices
    assert (tea.text, bomb.text, bomb.finish_reason) == ("tea", "", "content_filter")


def test_chat_log_probabilities(client):
    said = {"model": "tiny", "messages": [{"role": "user", "content": "one two"}], "temperature": 0}
    (choice,) = client.chat.completions.create(**said, logprobs=True, top_logprobs=1).choices
    assert [(item.token, item.logprob) for item in choice.logprobs.content] == [("one ", -0.5), ("two", -0.375)]
    assert choice.logprobs.content[0].bytes == list(b"one ")
    assert choice.logprobs.content[0].top_logprobs[0].token == "one "
    assert client.chat.completions.create(**said, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    chunks = client.chat.completions.create(**said, logprobs=True, stream=True)
    streamed = [
        item.token for c in chunks for choice in c.choices if choice.logprobs for item in choice.logprobs.content
    ]
    assert streamed == ["one ", "two"]
    with pytest.raises(openai.BadRequestError, match="only allowed when logprobs is true"):
        client.chat.completions.create(**said, top_logprobs=2)
