"""`/v1/chat/completions` and `/v1/models` through the openai client."""

import asyncio
import threading
from contextlib import ExitStack

import openai
import pytest
from fixtures.sqlite import sqlite_url

from reft_ray.api.chat_model import ChatOverloadedError, ContextLengthError
from reft_ray.api.moderator import LocalModerator, UnavailableError
from reft_ray.api.service_app import create_service_app
from reft_ray.api.settings import BaseModelSettings, ServiceSettings
from reft_ray.api.stores import Stores
from reft_ray.core.completion import Piece
from reft_ray.jobs.database import Database
from reft_ray.jobs.job import Event, JobSpec, Status
from reft_ray.testbed.word_scorer import WordScorer

BLOCKING = {"policy": {"input": {"mode": "block"}}}
SAY = [{"role": "user", "content": "one two three"}]


def talk(client, **options):
    return client.chat.completions.create(**{"model": "tiny", "messages": SAY, "temperature": 0} | options)


@pytest.fixture
def student(service):
    """A finetuned model of the project, as the pipeline registers it."""
    stores = service.stores
    job = stores.jobs.create("org-acme", service.project_id, JobSpec("tiny", "file-1", 1, suffix="mine"), {})
    for status in (Status.QUEUED, Status.RUNNING):
        stores.jobs.move(job.id, status, Event("on"))
    with stores.database.write() as connection:
        job = stores.jobs.move_in(
            connection, stores.jobs.get(job.id), Status.SUCCEEDED, Event("done"), fine_tuned_model=job.model_name
        )
        stores.models.register_in(connection, job, "/adapters/1")
    return job.model_name


def test_a_completion_has_every_required_key(client):
    answer = talk(client)
    choice = answer.choices[0]
    assert (answer.object, answer.model, choice.finish_reason) == ("chat.completion", "tiny", "stop")
    assert (choice.message.role, choice.message.content, choice.message.refusal) == ("assistant", "one two three", None)
    assert answer.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "total_tokens": 6,
    }
    assert "moderation" not in answer.model_fields_set


def test_sampling_options_reach_the_model(client):
    assert talk(client, max_completion_tokens=2).choices[0].message.content == "one two "
    assert talk(client, max_tokens=1).choices[0].finish_reason == "length"
    assert talk(client, stop="two").choices[0].message.content == "one "
    assert [choice.index for choice in talk(client, n=3).choices] == [0, 1, 2]
    assert talk(client, n=3).usage.completion_tokens == 9
    first, again = (talk(client, temperature=1, seed=5).choices[0].message.content for _ in range(2))
    assert first == again


def test_a_stream_has_the_same_text_in_pieces(client):
    chunks = list(talk(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "one two three"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == 6
    assert all(chunk.usage is None for chunk in chunks[:-1])
    plain = list(talk(client, stream=True, n=2))
    assert {chunk.choices[0].index for chunk in plain} == {0, 1}


def test_moderation_scores_both_sides(client):
    answer = talk(client, messages=[{"role": "user", "content": "build a bomb"}], extra_body={"moderation": {}})
    assert answer.choices[0].message.content == "build a bomb"
    for side in (answer.moderation.input, answer.moderation.output):
        assert side.type == "moderation_results"
        assert side.results[0].flagged is True
        assert side.results[0].categories["harmful"] is True
        assert len(side.results[0].categories) == 14


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("side", ["input", "output"])
def test_moderation_blocks_before_any_text_is_sent(client, stream, side):
    moderation = {"policy": {side: {"mode": "block"}}}
    answer = talk(
        client,
        messages=[{"role": "user", "content": "build a bomb"}],
        stream=stream,
        extra_body={"moderation": moderation},
    )
    if stream:
        chunks = list(answer)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ""
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "content_filter"
        assert getattr(next(chunk for chunk in chunks if not chunk.choices).moderation, side).results[0].flagged
    else:
        assert answer.choices[0].finish_reason == "content_filter"
        assert answer.choices[0].message.content is None
        assert answer.choices[0].message.refusal
        assert getattr(answer.moderation, side).results[0].flagged


@pytest.mark.parametrize(
    ("options", "param", "code"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages", "invalid_value"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"stop": ["x", "x" * 257]}, "stop", "invalid_value"),
        ({"extra_body": {"moderation": {"polcy": {}}}}, "moderation.polcy", "unknown_parameter"),
        ({"logit_bias": {"50256": -100}}, "logit_bias", "unsupported_parameter"),
        ({"tool_choice": "required"}, "tool_choice", "unsupported_parameter"),
        ({"modalities": ["text", "audio"]}, "modalities", "unsupported_parameter"),
        ({"store": True}, "store", "unsupported_parameter"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "unsupported_parameter"),
        ({"extra_body": {"temperatur": 0}}, "temperatur", "unknown_parameter"),
        ({"messages": [{"role": "user", "content": "x", "contnet": "y"}]}, "messages.0.contnet", "unknown_parameter"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
            "messages",
            "unsupported_image",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
            "messages",
            "unsupported_audio",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "file", "file": {}}]}]}, "messages", "unsupported_file"),
    ],
)
def test_unsupported_parameters_are_refused_by_name(client, options, param, code):
    with pytest.raises(openai.BadRequestError) as caught:
        talk(client, **options)
    assert (caught.value.param, caught.value.code) == (param, code)


def test_parameters_that_ask_for_nothing_are_accepted(client):
    answer = talk(
        client, user="u", metadata={"a": "b"}, store=False, tools=[], tool_choice="auto", logit_bias={},
        response_format={"type": "text"}, service_tier="auto", modalities=["text"], parallel_tool_calls=True,
    )  # fmt: skip
    assert answer.choices[0].message.content == "one two three"


def test_a_misspelt_parameter_is_named_with_the_right_one(client):
    with pytest.raises(openai.BadRequestError, match=r"supplied: temperatur\. Did you mean temperature\?"):
        talk(client, extra_body={"temperatur": 0})


CALLED = [
    {"role": "user", "content": "go on"},
    {
        "role": "assistant",
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "run", "arguments": '{"plan": "build a bomb"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "done"},
]


def test_tool_calls_of_earlier_turns_are_judged(client):
    answer = talk(client, messages=CALLED, extra_body={"moderation": {}})
    found = answer.moderation.input.results[0]
    assert found.flagged
    assert found.model_extra["reft"]["part"] == "messages[1].assistant.tool_calls[0]"
    refused = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "refusal": "no bomb"},
        {"role": "user", "content": "y"},
    ]
    assert talk(client, messages=refused, extra_body={"moderation": {}}).moderation.input.results[0].flagged


def test_unknown_models_are_404(client):
    for call in (lambda: talk(client, model="ft:no"), lambda: client.models.retrieve("ft:no")):
        with pytest.raises(openai.NotFoundError) as caught:
            call()
        assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


def test_models_list_bases_and_students(client, service, student):
    listed = {model.id: model for model in client.models.list()}
    assert {"tiny", "org/slashed", student} <= set(listed)
    assert listed[student].owned_by == "org-acme"
    assert client.models.retrieve("org/slashed").id == "org/slashed"
    assert talk(client, model=student).model == student
    stranger = service.client("stranger")
    assert student not in {model.id for model in stranger.models.list()}
    for call in (lambda: talk(stranger, model=student), lambda: stranger.models.delete(student)):
        with pytest.raises(openai.NotFoundError):
            call()
    assert client.models.delete(student).deleted is True
    with pytest.raises(openai.NotFoundError):
        talk(client, model=student)
    with pytest.raises(openai.PermissionDeniedError):
        client.models.delete("tiny")


def test_chat_with_checkpoints_only_where_the_operator_allows_it(client, student, service):
    with pytest.raises(openai.NotFoundError):
        talk(client, model=f"{student}:ckpt-step-10")


class Failing:
    def __init__(self, error, after=0):
        self.error, self.after = error, after

    async def generate(self, target, conversation, sampling):
        for _ in range(self.after):
            yield Piece("word ")
        raise self.error


@pytest.fixture
def failing(tmp_path):
    """A client of a service whose model fails in a given way."""
    with ExitStack() as stack:

        def make(serving, error, after=0):
            stores = Stores.open(
                Database.open(sqlite_url(tmp_path)),
                str(tmp_path / "files"),
                ServiceSettings(base_models={"tiny": BaseModelSettings(uri="/m")}),
            )
            app = create_service_app(LocalModerator(WordScorer()), stores, Failing(error, after))
            url = stack.enter_context(serving(app))
            return stack.enter_context(openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0))

        yield make


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_without_a_verdict_costs_nothing(service, monkeypatch, stream):
    async def judge(*_):
        raise UnavailableError("no teacher")

    secret = service.stores.tenants.create_key("acme", f"calm-{stream}", "x", limits={"tokens_per_minute": 200})[1]
    client = service.connect(secret, max_retries=0)
    with monkeypatch.context() as broken:
        broken.setattr(LocalModerator, "judge", judge)
        for _ in range(3):
            with pytest.raises(openai.InternalServerError) as caught:
                talk(client, max_tokens=100, stream=stream, extra_body={"moderation": BLOCKING})
            assert caught.value.status_code == 503
    assert talk(client, max_tokens=100).choices


def complete(client, **options):
    return client.completions.create(model="tiny", prompt=["one", "two"], **options)


@pytest.mark.parametrize("call", [talk, complete])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status"), [(ContextLengthError("512 tokens at most"), 400), (ChatOverloadedError("full"), 503)]
)
def test_a_model_that_fails_at_once_has_its_status(failing, serving, error, status, stream, call):
    with pytest.raises(openai.APIStatusError) as caught:
        call(failing(serving, error), stream=stream)
    assert caught.value.status_code == status


@pytest.mark.parametrize("call", [talk, complete])
def test_a_model_that_fails_during_the_stream_is_an_error(failing, serving, call):
    stream = call(failing(serving, ChatOverloadedError("full"), after=2), stream=True)
    choices = (chunk.choices[0] for chunk in stream)
    said = []
    with pytest.raises(openai.APIError, match="during the stream"):
        said.extend(choice.text if call is complete else choice.delta.content for choice in choices)
    assert "".join(said).startswith("word word ")


@pytest.mark.parametrize("call", [talk, complete])
def test_a_client_that_disconnects_frees_the_model(tmp_path, serving, call):
    freed = threading.Event()

    class Endless:
        async def generate(self, target, conversation, sampling):
            try:
                while True:
                    yield Piece("word " * 200)
                    await asyncio.sleep(0.001)
            finally:
                freed.set()

    stores = Stores.open(
        Database.open(sqlite_url(tmp_path)),
        str(tmp_path / "files"),
        ServiceSettings(base_models={"tiny": BaseModelSettings(uri="/m")}),
    )
    app = create_service_app(LocalModerator(WordScorer()), stores, Endless())
    with serving(app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        with call(client, stream=True) as stream:
            next(iter(stream))
        assert freed.wait(10)
