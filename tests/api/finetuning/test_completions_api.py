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
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "unknown_parameter"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
            "invalid_value",
        ),
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


def test_a_stream_has_the_text_and_the_log_probabilities_of_the_answer(client):
    asked = {"prompt": ["one two", "three four five"], "n": 2, "logprobs": 1, "echo": True, "max_tokens": 2}
    whole = complete(client, **asked)
    chunks = list(complete(client, **asked, stream=True, stream_options={"include_usage": True}))
    assert {chunk.object for chunk in chunks} == {"text_completion"}
    assert len({chunk.id for chunk in chunks}) == 1
    *said, last = chunks
    assert (last.choices, last.usage) == ([], whole.usage)
    assert all(chunk.usage is None for chunk in said)
    for index, expected in enumerate(whole.choices):
        mine = [choice for chunk in said for choice in chunk.choices if choice.index == index]
        assert "".join(choice.text for choice in mine) == expected.text
        assert [choice.finish_reason for choice in mine if choice.finish_reason] == [expected.finish_reason]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            found = [item for choice in mine for item in getattr(choice.logprobs, name)]
            assert found == getattr(expected.logprobs, name)


def test_a_stream_without_options_ends_with_its_last_choice(client):
    chunks = list(complete(client, [f"text {index}" for index in range(20)], stream=True))
    texts = [""] * 20
    for chunk in chunks:
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        assert choice.logprobs is None
    assert texts == [f"text {index}" for index in range(20)]


@pytest.mark.parametrize("side", ["input", "output"])
def test_a_stream_sends_nothing_that_the_filter_blocks(client, side):
    blocking = {"moderation": {"policy": {side: {"mode": "block"}}}}
    chunks = list(complete(client, "build a bomb", stream=True, extra_body=blocking))
    assert [(choice.text, choice.finish_reason) for chunk in chunks for choice in chunk.choices] == [
        ("", "content_filter")
    ]
    assert chunks[-1].moderation[side]["results"][0]["flagged"] is True
    tea = list(complete(client, "tea", stream=True, extra_body=blocking))
    assert "".join(choice.text for chunk in tea for choice in chunk.choices) == "tea"


def test_a_reported_stream_ends_with_its_verdicts(client):
    chunks = list(complete(client, ["tea", "build a bomb"], stream=True, extra_body={"moderation": {}}))
    assert "".join(c.text for chunk in chunks for c in chunk.choices if c.index == 1) == "build a bomb"
    assert [item["flagged"] for item in chunks[-1].moderation["output"]["results"]] == [False, True]


def test_a_stream_costs_what_it_generated(service):
    secret = service.stores.tenants.create_key("acme", "streamed", "x", limits={"tokens_per_minute": 100})[1]
    client = service.connect(secret, max_retries=0)
    for _ in range(3):
        list(complete(client, "one two", max_tokens=80, stream=True))
    with complete(client, "one two", max_tokens=80, stream=True) as stream:
        next(iter(stream))
    with pytest.raises(openai.RateLimitError, match="too large"):
        complete(client, "one two", max_tokens=500, stream=True)


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
