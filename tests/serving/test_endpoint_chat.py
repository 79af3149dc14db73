"""EndpointChat: how a server loads adapters, and how its failures are reported."""

import asyncio
import json

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import ValidationError

from reft_ray.api.chat_model import ChatError, ChatOverloadedError, ContextLengthError, ConversationError, Target
from reft_ray.api.settings import EndpointSettings
from reft_ray.core.completion import Sampling
from reft_ray.core.conversation import chat
from reft_ray.core.errors import UsageError
from reft_ray.serving.args import ServiceArgs
from reft_ray.serving.chat import chat_of
from reft_ray.serving.endpoint_chat import EndpointChat

CONTEXT = 64
ADAPTER = Target("ft:mine", "small", "/m", "/models/jobs/1/adapter")
BASE = Target("small", "small", "/m")


class Server:
    """Answers as vLLM documents: adapters are loaded by name and path, and lost with its process."""

    def __init__(self):
        self.adapters = {}
        self.loads = []
        self.seconds = 0.0
        self.asked = []
        self.keys = []
        self.models = []
        self.app = FastAPI()
        self.app.post("/v1/load_lora_adapter")(self.load)
        self.app.post("/v1/chat/completions")(self.complete)

    async def load(self, request: Request):
        body = await request.json()
        await asyncio.sleep(self.seconds)
        self.loads.append(body)
        if body["lora_name"] in self.adapters:
            message = f"The lora adapter '{body['lora_name']}' has already been loaded."
            return JSONResponse({"error": {"message": message, "code": 400}}, 400)
        if not body["lora_path"].startswith("/models/"):
            return JSONResponse({"error": {"message": "No adapter found", "code": 404}}, 404)
        self.adapters[body["lora_name"]] = body["lora_path"]
        return JSONResponse("Success: LoRA adapter added successfully.")

    async def complete(self, request: Request):
        body = await request.json()
        self.keys.append(request.headers["authorization"])
        self.models.append(body["model"])
        self.asked.append(body.get("max_tokens"))
        if body["model"].startswith("reft-") and body["model"] not in self.adapters:
            return JSONResponse({"error": {"message": "The model does not exist.", "code": 404}}, 404)
        words = sum(len(turn["content"].split()) for turn in body["messages"])
        if words + body.get("max_tokens", 1) > CONTEXT:
            message = f"This model's maximum context length is {CONTEXT} tokens. However, you requested more."
            return JSONResponse({"error": {"message": message, "type": "BadRequestError", "code": 400}}, 400)
        if body["model"] == "busy":
            return JSONResponse({"error": {"message": "full"}}, 503, {"retry-after": "7"})

        async def events():
            delta = {"delta": {"content": self.adapters.get(body["model"], body["model"])}, "finish_reason": None}
            yield f"data: {json.dumps({'choices': [delta]})}\n\n"
            if body["model"] != "broken":
                yield f"data: {json.dumps({'choices': [{'delta': {}, 'finish_reason': 'stop'}]})}\n\n"
                yield f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': 3, 'prompt_tokens': 5}})}\n\n"
                yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")


@pytest.fixture
def server():
    return Server()


@pytest.fixture
def url(server, serving):
    with serving(server.app) as address:
        yield f"{address}/v1"


def answers(args, *targets, sampling=None):
    """The answer to each target in turn; failures as values."""

    async def run():
        model, found = EndpointChat(args), []
        for target in targets:
            try:
                pieces = [piece async for piece in model.generate(target, chat("hello"), sampling or Sampling(8))]
            except ChatError as error:
                found.append(error)
            else:
                found.append("".join(piece.text for piece in pieces))
                assert pieces[-1].finish_reason == "stop"
                assert sum(piece.tokens for piece in pieces) == 3
                assert sum(piece.prompt_tokens for piece in pieces) == 5
        await model.close()
        return found

    return asyncio.run(run())


def test_an_adapter_is_loaded_once_from_its_path(server, url):
    args = EndpointSettings(url=url, model="small", adapters="load")
    assert answers(args, ADAPTER, ADAPTER, BASE) == [ADAPTER.adapter_uri] * 2 + ["small"]
    assert [body["lora_path"] for body in server.loads] == [ADAPTER.adapter_uri]
    # Another gateway has loaded it already.
    assert answers(args, ADAPTER) == [ADAPTER.adapter_uri]
    assert len(server.loads) == 2


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_concurrent_requests_share_one_load_and_those_of_the_base_do_not_wait(server, url, scheme):
    server.seconds = 0.3
    adapter = Target("ft:mine", "small", "/m", f"{scheme}{ADAPTER.adapter_uri}")
    endpoint = {"url": url, "model": "small", "adapters": "load"}
    service = {"database_url": "sqlite:///x", "files_uri": "/f", "base_models": {"small": {"uri": "/m"}}}
    service["base_models"]["small"]["endpoint"] = endpoint
    ended = []

    async def one(model, target):
        pieces = [piece async for piece in model.generate(target, chat("hello"), Sampling(8))]
        ended.append(target.name)
        return pieces[0].text

    async def run():
        # From the operator's arguments.
        model = chat_of(ServiceArgs.model_validate(service), {})
        said = await asyncio.gather(*(one(model, target) for target in (adapter, BASE, adapter, adapter)))
        await model._models["small"].close()
        return said

    path = ADAPTER.adapter_uri
    assert asyncio.run(run()) == [path, "small", path, path]
    assert [body["lora_path"] for body in server.loads] == [path]
    assert ended[0] == BASE.name


def test_an_adapter_is_loaded_again_after_a_restart_of_the_server(server, url):
    async def run():
        model = EndpointChat(EndpointSettings(url=url, model="small", adapters="load"))
        said = []
        for _ in range(2):
            pieces = [piece async for piece in model.generate(ADAPTER, chat("hello"), Sampling(8))]
            said.append(pieces[0].text)
            server.adapters.clear()
        await model.close()
        return said

    assert asyncio.run(run()) == [ADAPTER.adapter_uri] * 2
    assert len(server.loads) == 2


def test_a_failed_load_is_an_error_and_is_retried(server, url):
    lost = Target("ft:lost", "small", "/m", "/elsewhere/adapter")
    first, second = answers(EndpointSettings(url=url, model="small", adapters="load"), lost, lost)
    assert str(first) == str(second) == f"{url} did not load the adapter: HTTP 404"
    assert len(server.loads) == 2
    assert server.models == []


def test_adapters_by_path_and_none(server, url):
    by_path = EndpointSettings(url=url, model="small", adapters="path", adapters_root="/models")
    outside = Target("ft:x", "small", "/m", "/other/adapter")
    # A sibling directory with the same prefix is not below the root either.
    sibling = Target("ft:y", "small", "/m", "/models-2/jobs/1/adapter")
    said, *refused = answers(by_path, ADAPTER, outside, sibling)
    assert said == "small:jobs/1/adapter"
    assert all("is not below /models/" in str(error) for error in refused)
    bucket = Target("ft:z", "small", "/m", "s3://bucket/reft/p/jobs/1/export")
    rooted = EndpointSettings(url=url, model="small", adapters="path", adapters_root="s3://bucket/reft/")
    assert answers(rooted, bucket) == ["small:p/jobs/1/export"]
    assert server.loads == []
    (refused,) = answers(EndpointSettings(url=url, model="small"), ADAPTER)
    assert str(refused) == f"{url} serves no adapters"


def test_adapters_by_path_need_a_root_and_a_base_without_colon():
    for wrong in ({"adapters": "path"}, {"adapters": "load", "adapters_root": "s3://b"}):
        with pytest.raises(ValidationError, match="adapters_root belongs to"):
            EndpointSettings(url="http://h/v1", model="small", **wrong)
    with pytest.raises(ValidationError, match="takes the part after a colon as an adapter"):
        EndpointSettings(url="http://h/v1", model="small:8b", adapters="path", adapters_root="s3://b")


def test_the_services_own_limit_gives_way_to_the_servers_context(server, url):
    args = EndpointSettings(url=url, model="small")
    assert answers(args, BASE, sampling=Sampling(100)) == ["small"]
    assert server.asked == [100, None]
    (refused,) = answers(args, BASE, sampling=Sampling(100, must_fit=True))
    assert isinstance(refused, ContextLengthError)
    assert "maximum context length is 64 tokens" in str(refused)


@pytest.mark.parametrize("token", ["<|im_end|>", "<|start_header_id|>", "</s>", "<end_of_turn>", "[/INST]", "<think>"])
def test_content_with_a_control_token_is_not_sent(server, url, token):
    async def ask():
        student = EndpointChat(EndpointSettings(url=url, model="base"))
        try:
            await anext(student.generate(BASE, chat(f"hi{token}you"), Sampling(max_tokens=8)))
        finally:
            await student.close()

    with pytest.raises(ConversationError, match=r"messages\[0\].content has the control token"):
        asyncio.run(ask())
    assert server.models == []


def test_failures_have_their_own_errors(server, url, monkeypatch):
    monkeypatch.setenv("SERVERS_KEY", "s3cret")
    (busy,) = answers(EndpointSettings(url=url, model="busy", key_variable="SERVERS_KEY"), BASE)
    assert isinstance(busy, ChatOverloadedError)
    assert server.keys == ["Bearer s3cret"]
    (broken,) = answers(EndpointSettings(url=url, model="broken"), BASE)
    assert str(broken) == "the server's stream ended early"
    (unreachable,) = answers(EndpointSettings(url="http://127.0.0.1:9/v1", model="small"), BASE)
    assert str(unreachable) == "http://127.0.0.1:9/v1: ConnectError"
    monkeypatch.delenv("SERVERS_KEY")
    with pytest.raises(UsageError, match="SERVERS_KEY is empty"):
        EndpointChat(EndpointSettings(url=url, model="small", key_variable="SERVERS_KEY"))
