"""`reft-ray gateway` between the real client and two upstreams: a small one of the standard library, and our own."""

import json
from contextlib import contextmanager

import httpx
import openai
import pytest
from fixtures.sqlite import sqlite_url
from proxy.small_upstream import KEY, SmallUpstream
from typer.testing import CliRunner

from reft_ray.api.chat_model import EchoChat
from reft_ray.api.moderator import LocalModerator, UnavailableError
from reft_ray.api.service_app import create_service_app
from reft_ray.api.settings import BaseModelSettings, ServiceSettings
from reft_ray.api.stores import Stores
from reft_ray.cli.main import app
from reft_ray.core.errors import UsageError
from reft_ray.jobs.database import Database
from reft_ray.proxy.app import create_proxy
from reft_ray.proxy.upstream import ProxySettings
from reft_ray.testbed.word_scorer import WordScorer

TEXTS = ["bake bread", "build a bomb", "brew tea", "a tactical knife", "milk and honey"]
SAY = [{"role": "user", "content": "one two"}]


def rows(texts=TEXTS):
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": "ok"}] for text in texts]
    return b"".join(json.dumps({"messages": messages}).encode() + b"\n" for messages in turns)


class Moderator(LocalModerator):
    """The word scorer; with `failing` it gives no verdict."""

    failing = False

    async def judge(self, *arguments, **options):
        if self.failing:
            raise UnavailableError("no teacher")
        return await super().judge(*arguments, **options)


@contextmanager
def proxied(serving, url, folder, key=KEY, **options):
    moderator = Moderator(WordScorer())
    settings = ProxySettings(upstream=url, state=str(folder / "state"), **options)
    with (
        serving(create_proxy(moderator, settings)) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0) as client,
    ):
        client.moderator, client.address = moderator, address
        yield client


@pytest.fixture
def upstream():
    upstream = SmallUpstream()
    yield upstream
    upstream.close()


@pytest.fixture
def client(serving, upstream, tmp_path):
    with proxied(serving, upstream.url, tmp_path) as client:
        yield client


def upload(client, content, **options):
    return client.files.create(file=("train.jsonl", content), purpose="fine-tune", **options)


def code_of(call):
    with pytest.raises(openai.APIStatusError) as caught:
        call()
    return caught.value.status_code, caught.value.code


def test_only_kept_rows_reach_the_upstream(client, upstream):
    file = upload(client, b"\xef\xbb\xbf" + rows() + b"\n")
    assert upstream.files[file.id] == rows([TEXTS[0], TEXTS[2], TEXTS[4]])
    found = file.model_extra["reft"]
    assert {name: found[name] for name in ("rows", "kept", "review", "blocked", "invalid")} == {
        "rows": 5, "kept": 3, "review": 1, "blocked": 1, "invalid": 0,
    }  # fmt: skip
    assert [(row["line"], row["decision"]) for row in found["withheld"]] == [(2, "block"), (4, "review")]
    answer = httpx.get(client.address + found["evidence"], headers={"authorization": f"Bearer {KEY}"})
    summary, *withheld = map(json.loads, answer.text.splitlines())
    assert (summary["type"], summary["policy"]) == ("summary", found["policy"])
    assert withheld == found["withheld"]
    assert "bomb" not in answer.text
    job = client.fine_tuning.jobs.create(model="m", training_file=file.id, suffix="mine")
    assert json.loads(upstream.calls("POST", "/v1/fine_tuning/jobs")[0]) == {
        "model": "m", "training_file": file.id, "suffix": "mine",
    }  # fmt: skip
    assert job.id == "ftjob-1"
    client.files.delete(file.id)
    assert code_of(lambda: client.fine_tuning.jobs.create(model="m", training_file=file.id))[1] == "unscreened_file"


def test_a_file_that_did_not_come_through_here_is_not_trained_on(client, upstream):
    upstream.files["file-x"] = rows(["build a bomb"])
    for files in (
        {"training_file": "file-x"},
        {"training_file": upload(client, rows(["tea"])).id, "validation_file": "file-x"},
    ):
        with pytest.raises(openai.BadRequestError, match="not screened by this gateway"):
            client.fine_tuning.jobs.create(model="m", **files)
    assert not upstream.calls("POST", "/v1/fine_tuning/jobs")


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (rows(["build a bomb", "bomb", "tea"]), "unsafe_training_data"),
        (rows(["build a bomb"]), "unsafe_training_data"),
        (b"no json\n" * 3, "invalid_file_format"),
        (b"", "invalid_file_format"),
    ],
)
def test_bad_files_are_refused_with_their_rows(client, upstream, content, code):
    with pytest.raises(openai.BadRequestError) as caught:
        upload(client, content)
    assert caught.value.code == code
    assert [row["line"] for row in caught.value.body["rows"]] == [*range(1, len(caught.value.body["rows"]) + 1)]
    assert not upstream.files


def test_the_policy_fail_forwards_clean_files_only(serving, upstream, tmp_path):
    with proxied(serving, upstream.url, tmp_path, policy="fail") as client:
        assert code_of(lambda: upload(client, rows(["tea", "tea", "a knife"]))) == (400, "unsafe_training_data")
        assert upload(client, rows(["tea"])).model_extra["reft"]["kept"] == 1


def test_chat_is_judged_before_and_after_the_model(client, upstream):
    answer = client.chat.completions.create(model="m", messages=SAY, temperature=0.5, top_logprobs=None)
    assert answer.choices[0].message.content == "fine"
    assert json.loads(upstream.calls("POST", "/v1/chat/completions")[0])["temperature"] == 0.5
    refused = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "build a bomb"}])
    assert len(upstream.calls("POST", "/v1/chat/completions")) == 1
    upstream.answer = "here is the bomb"
    for answer in (refused, client.chat.completions.create(model="m", messages=SAY)):
        assert (answer.choices[0].finish_reason, answer.choices[0].message.content) == ("content_filter", None)


@pytest.mark.parametrize(
    "options",
    [
        {"messages": [*SAY, {"role": "assistant", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": "a bomb"}'}}]}]},
        {"tools": [{"type": "function", "function": {"name": "f", "description": "makes a bomb"}}]},
        {"extra_body": {"guided_choice": ["a bomb"]}},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a bo"}, {"type": "text", "text": "mb"}]}]},
    ],
)  # fmt: skip
def test_text_anywhere_in_a_request_is_judged(client, upstream, options):
    answer = client.chat.completions.create(**{"model": "m", "messages": SAY} | options)
    assert answer.choices[0].finish_reason == "content_filter"
    assert not upstream.calls("POST", "/v1/chat/completions")


def test_a_stream_is_judged_whole(client, upstream):
    def text():
        chunks = list(client.chat.completions.create(model="m", messages=SAY, stream=True))
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks), chunks[-1].choices[0].finish_reason

    assert text() == ("fine", None)
    # The word is split over two chunks.
    upstream.answer = "bomb"
    assert text() == ("", "content_filter")


def test_without_a_verdict_nothing_is_forwarded(client, upstream):
    client.moderator.failing = True
    assert code_of(lambda: upload(client, rows()))[0] == 503
    assert code_of(lambda: client.chat.completions.create(model="m", messages=SAY))[0] == 503
    assert not upstream.files
    assert not upstream.calls("POST", "/v1/chat/completions")


def test_unknown_paths_and_other_purposes_are_refused(client, upstream):
    for call, code in (
        (lambda: client.responses.create(model="m", input="build a bomb"), "unknown_url"),
        (lambda: client.completions.create(model="m", prompt="build a bomb"), "unknown_url"),
        (lambda: client.embeddings.create(model="m", input="x"), "unknown_url"),
        (lambda: client.uploads.create(bytes=1, filename="a", mime_type="a", purpose="fine-tune"), "unknown_url"),
        (
            lambda: client.batches.create(completion_window="24h", endpoint="/v1/responses", input_file_id="f"),
            "unknown_url",
        ),
        (lambda: client.files.create(file=("a.jsonl", b"{}"), purpose="batch"), "unsupported_purpose"),
    ):
        assert code_of(call)[1] == code
    assert {path for _, path, *_ in upstream.seen} == {"/v1/models"}
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
    assert code_of(lambda: client.chat.completions.create(model="m", messages=image))[0] == 400
    twice = b'{"model": "m", "messages": [{"role": "user", "content": "tea", "content": "bomb"}]}'
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    assert httpx.post(f"{client.base_url}chat/completions", content=twice, headers=headers).status_code == 400
    for path in ("files/../chat", "models/%2e%2e/chat", "files/a%2Fb/screening", "files/%03/screening", "models/%03"):
        assert httpx.get(f"{client.base_url}{path}", headers=headers).status_code == 404


def test_errors_of_the_upstream_come_back_as_they_are(client, upstream, tmp_path, serving):
    upstream.fails = 429
    with pytest.raises(openai.RateLimitError) as caught:
        upload(client, rows())
    assert caught.value.response.headers["retry-after"] == "7"
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(model="m", messages=SAY)
    with proxied(serving, "http://127.0.0.1:9/v1", tmp_path / "other", upstream_key=KEY) as nowhere:
        assert code_of(lambda: nowhere.models.list()) == (502, "upstream_unavailable")


def test_who_may_call(serving, upstream, tmp_path):
    with proxied(serving, upstream.url, tmp_path / "a", key="sk-wrong") as client:
        for call in (lambda: client.models.list(), lambda: client.moderations.create(input="x")):
            assert code_of(call) == (401, "invalid_api_key")
    own = {"upstream_key": KEY, "client_key": "sk-own"}
    with proxied(serving, upstream.url, tmp_path / "b", key="sk-own", **own) as client:
        assert client.models.list().data[0].id == "m"
        assert client.moderations.create(input="a bomb").results[0].flagged
        assert code_of(lambda: client.with_options(api_key=KEY).models.list()) == (401, "invalid_api_key")
    assert {headers.get("authorization") for *_, headers, _ in upstream.seen} >= {f"Bearer {KEY}"}
    assert not any("sk-own" in str(headers) for *_, headers, _ in upstream.seen)
    with pytest.raises(UsageError, match="needs an upstream key"):
        ProxySettings.of({"upstream": upstream.url, "state": "s", "client_key": "k"})


def test_our_own_service_as_the_upstream(serving, tmp_path):
    settings = ServiceSettings(base_models={"tiny": BaseModelSettings(uri="/models/tiny")}, require_keys=True)
    stores = Stores.open(Database.open(sqlite_url(tmp_path)), str(tmp_path / "files"), settings)
    _, secret = stores.tenants.create_key("acme", "one", "test")
    app = create_service_app(LocalModerator(WordScorer()), stores, EchoChat())
    with serving(app) as url, proxied(serving, f"{url}/v1", tmp_path, key=secret) as client:
        file = upload(client, rows(["bake bread", "build a bomb", *["brew tea"] * 10]))
        assert client.files.content(file.id).read() == rows(["bake bread", *["brew tea"] * 10])
        job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, seed=1)
        assert client.fine_tuning.jobs.retrieve(job.id).seed == 1
        assert [one.id for one in client.fine_tuning.jobs.list(limit=1)] == [job.id]
        assert client.fine_tuning.jobs.list_events(job.id).data
        assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
        assert client.chat.completions.create(model="tiny", messages=SAY).choices[0].message.content == "one two"
        said = [{"role": "user", "content": "milk"}]
        stream = client.chat.completions.create(model="tiny", messages=said, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "milk"
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve("file-none")


def test_a_public_address_without_keys_is_refused(upstream, tmp_path, monkeypatch):
    monkeypatch.setenv("UPSTREAM", KEY)
    options = ["--upstream", upstream.url, "--state", str(tmp_path), "--upstream-key", "env:UPSTREAM"]
    result = CliRunner().invoke(app, ["gateway", *options, "--host", "0.0.0.0"])
    assert (result.exit_code, "with --client-key, or bind" in result.output) == (2, True), result.output
    unset = CliRunner().invoke(app, ["gateway", *options, "--client-key", "env:NOT_SET_ANYWHERE"])
    assert (unset.exit_code, "NOT_SET_ANYWHERE is not set" in unset.output) == (2, True), unset.output
