"""One contract for all ChatModels: the echo fake, a real student, and an HTTP endpoint."""

import asyncio
import contextlib
import json
import shutil
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fixtures.sqlite import sqlite_url
from safetensors.torch import load_file, save_file

from reft_ray.api.chat_model import (
    ChatError,
    ChatOverloadedError,
    ContextLengthError,
    ConversationError,
    EchoChat,
    Target,
)
from reft_ray.api.moderator import LocalModerator
from reft_ray.api.service_app import create_service_app
from reft_ray.api.settings import BaseModelSettings, EndpointSettings, ServiceSettings
from reft_ray.api.stores import Stores
from reft_ray.core.completion import RawPrompt, Sampling
from reft_ray.core.conversation import chat
from reft_ray.core.errors import ReftError
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.generate import Responder
from reft_ray.hf.loading import load_base
from reft_ray.hf.lora import attach_saved, merge
from reft_ray.jobs.database import Database
from reft_ray.serving.args import ChatArgs
from reft_ray.serving.chat import ChatByBase
from reft_ray.serving.endpoint_chat import EndpointChat
from reft_ray.serving.student import StudentReplica
from reft_ray.testbed.word_scorer import WordScorer

SAY = chat("how can i bake bread please tell me")
BASE = Target("tiny", "tiny", "/m")
GREEDY = Sampling(6, temperature=0.0)
# Greedy decoding of the random base gives special tokens only, which have no text.
TALKATIVE = Sampling(12, temperature=1.5, seed=3)


@pytest.fixture(scope="module")
def student(llama):
    args = ChatArgs(device="cpu", precision="float32", max_adapters=2, max_rows=4, max_waiting=8)
    replica = StudentReplica(str(llama), args)
    yield replica
    replica.close()


@pytest.fixture(scope="module")
def server(student, tmp_path_factory, serving):
    """Our service as an OpenAI-compatible server."""
    root = tmp_path_factory.mktemp("server")
    services = Stores.open(
        Database.open(sqlite_url(root)),
        str(root / "files"),
        ServiceSettings(base_models={"tiny": BaseModelSettings(uri="/m")}),
    )
    with serving(create_service_app(LocalModerator(WordScorer()), services, student)) as url:
        yield f"{url}/v1"


@contextlib.asynccontextmanager
async def opened(name, student, server):
    if name == "endpoint":
        model = EndpointChat(EndpointSettings(url=server, model="tiny"))
        try:
            yield model
        finally:
            await model.close()
    else:
        yield {"echo": EchoChat(), "student": student, "routed": ChatByBase({"tiny": student})}[name]


async def pieces_of(model, sampling=GREEDY, target=BASE, conversation=SAY):
    async with aclosing(model.generate(target, conversation, sampling)) as stream:
        return [piece async for piece in stream]


def said(pieces):
    return "".join(piece.text for piece in pieces)


MODELS = pytest.mark.parametrize("name", ["echo", "student", "routed", "endpoint"])


@MODELS
def test_only_the_last_piece_has_a_finish_reason(name, student, server):
    async def run():
        async with opened(name, student, server) as model:
            return await pieces_of(model), await pieces_of(model, Sampling(40, temperature=0.0))

    short, long = asyncio.run(run())
    for pieces in (short, long):
        assert [piece.finish_reason is not None for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        assert sum(piece.prompt_tokens > 0 for piece in pieces) == 1
    assert sum(piece.tokens for piece in short) == 6
    assert short[-1].finish_reason == "length"


@MODELS
def test_greedy_and_seeded_completions_are_repeatable(name, student, server):
    async def run():
        async with opened(name, student, server) as model:
            for sampling in (GREEDY, Sampling(8, temperature=1.5, seed=3), Sampling(8, top_p=0.8, seed=3)):
                alone = said(await pieces_of(model, sampling))
                others = [Sampling(5, temperature=2.0, seed=seed) for seed in range(3)]
                together = await asyncio.gather(*(pieces_of(model, each) for each in (sampling, *others)))
                assert said(together[0]) == alone
            seeds = {said(await pieces_of(model, Sampling(8, temperature=1.5, seed=seed))) for seed in range(4)}
            assert len(seeds) > 1

    asyncio.run(run())


@MODELS
def test_a_stop_sequence_ends_the_text_and_is_not_part_of_it(name, student, server):
    async def run():
        async with opened(name, student, server) as model:
            whole = said(await pieces_of(model, TALKATIVE))
            # Across token boundaries, and not at the beginning.
            stop = whole[4:7]
            pieces = await pieces_of(model, replace(TALKATIVE, stop=("never said", stop)))
            return whole, stop, pieces

    whole, stop, pieces = asyncio.run(run())
    assert stop not in said(pieces)
    assert whole.startswith(said(pieces))
    assert pieces[-1].finish_reason == "stop"


@MODELS
def test_a_cancelled_request_frees_its_row(name, student, server):
    async def run():
        async with opened(name, student, server) as model:
            async with aclosing(model.generate(BASE, SAY, Sampling(200, temperature=2.0))) as stream:
                await anext(stream)
            for _ in range(200):
                if student.engine.ongoing_requests == 0:
                    break
                await asyncio.sleep(0.05)
            assert student.engine.ongoing_requests == 0
            assert said(await pieces_of(model, TALKATIVE))

    asyncio.run(run())


def test_a_request_above_the_context_is_rejected_with_its_size(student, server):
    async def run():
        endpoint = EndpointChat(EndpointSettings(url=server, model="tiny"))
        for model in (student, endpoint):
            with pytest.raises(ContextLengthError, match="maximum context length is 256 tokens"):
                await pieces_of(model, Sampling(250, must_fit=True))
            with pytest.raises(ContextLengthError):
                await pieces_of(model, Sampling(5), conversation=chat("bread " * 300))
        await endpoint.close()
        # Without `must_fit` the completion ends with the context.
        return await pieces_of(student, Sampling(4096, temperature=2.0, seed=1))

    pieces = asyncio.run(run())
    assert sum(piece.tokens + piece.prompt_tokens for piece in pieces) <= 256


def test_a_conversation_that_the_template_rejects_is_a_conversation_error(student, monkeypatch):
    def refuse(*_, **__):
        raise ReftError("the chat template refuses this conversation: roles must alternate")

    monkeypatch.setattr(student.engine.base.chat, "render", refuse)
    with pytest.raises(ConversationError, match="roles must alternate"):
        asyncio.run(pieces_of(student))


def merged(base, adapter):
    """The output of plain transformers with the adapter merged into the base."""
    loaded = load_base(str(base))
    model = merge(attach_saved(loaded.model, "student", Path(adapter))) if adapter else loaded.model
    return Responder(model, ChatFormat(loaded.tokenizer), 12)([SAY])[0].rstrip("\ufffd")


def test_rows_of_several_adapters_share_a_batch_and_do_not_mix(student, adapters, llama):
    targets = [BASE, *(Target(f"ft:{i}", "tiny", "/m", uri) for i, uri in enumerate(adapters))]
    sampling = Sampling(12, temperature=0.0)

    async def run():
        alone = [said(await pieces_of(student, sampling, target)) for target in targets]
        # Five targets on two adapter slots, three requests each, all at once.
        order = targets * 3
        # At most twelve at once: four rows, eight waiting.
        together = await asyncio.gather(*(pieces_of(student, sampling, target) for target in order[:12]))
        return alone, [said(pieces) for pieces in together]

    alone, together = asyncio.run(run())
    # The limit may cut a character: transformers prints the half, the stream does not.
    assert [text.strip() for text in alone] == [merged(llama, adapter) for adapter in (None, *adapters)]
    assert len(set(alone)) == 5
    assert together == (alone * 3)[:12]
    assert len(student.engine.base.adapters) <= 2


def test_a_full_queue_rejects_requests_and_loses_none(student):
    async def one():
        try:
            return (await pieces_of(student, Sampling(30, temperature=0.0)))[-1].finish_reason
        except ChatOverloadedError:
            return "full"

    async def run():
        return await asyncio.gather(*(one() for _ in range(40)))

    ends = asyncio.run(run())
    assert ends.count("full") > 0
    assert len(ends) - ends.count("full") >= 8
    assert student.engine.ongoing_requests == 0


@pytest.mark.parametrize("damage", ["missing", "pickle", "base", "shape", "json"])
def test_an_invalid_adapter_fails_only_its_own_request(student, adapters, tmp_path, damage):
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = json.loads((Path(adapters[0]) / "adapter_config.json").read_text())
    weights = (Path(adapters[0]) / "adapter_model.safetensors").read_bytes()
    if damage == "base":
        config["modules_to_save"] = ["lm_head"]
    if damage == "shape":
        config["r"] = 8
    (folder / "adapter_config.json").write_text("no" if damage == "json" else json.dumps(config))
    if damage == "pickle":
        (folder / "adapter_model.bin").write_bytes(weights)
    elif damage != "missing":
        (folder / "adapter_model.safetensors").write_bytes(weights)

    async def run():
        bad = pieces_of(student, target=Target("ft:bad", "tiny", "/m", str(folder)))
        return await asyncio.gather(bad, pieces_of(student), return_exceptions=True)

    error, pieces = asyncio.run(run())
    assert isinstance(error, ChatError), error
    assert str(folder) in str(error)
    assert said(pieces) == said(asyncio.run(pieces_of(student)))


def test_nan_logits_fail_only_their_own_row(student, adapters, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(adapters[0], folder)
    state = load_file(folder / "adapter_model.safetensors")
    save_file({key: tensor * float("nan") for key, tensor in state.items()}, folder / "adapter_model.safetensors")

    async def run():
        bad = pieces_of(student, target=Target("ft:nan", "tiny", "/m", str(Path(folder))))
        return await asyncio.gather(bad, pieces_of(student), return_exceptions=True)

    error, pieces = asyncio.run(run())
    assert isinstance(error, ChatError)
    assert "logits are NaN" in str(error)
    assert pieces[-1].finish_reason == "length"


def ends(model, count, target=BASE):
    """The outcomes of `count` completions in sequence."""

    def one():
        try:
            asyncio.run(pieces_of(model, target=target))
        except ChatError as error:
            return str(error)
        return "answered"

    return [one() for _ in range(count)]


@pytest.mark.parametrize("adapter", [None, "fits"])
def test_a_replica_whose_device_has_failed_is_replaced(llama, adapters, adapter, monkeypatch):
    replica = StudentReplica(str(llama), ChatArgs(device="cpu", precision="float32"))
    target = Target("ft:0", "tiny", "/m", adapters[0]) if adapter else BASE
    try:
        with monkeypatch.context() as broken:

            def fail(*_, **__):
                raise RuntimeError("device-side assert")

            # Loading an adapter uses the device too, and fails as if the adapter did not fit.
            broken.setattr(type(replica.engine.base), "logits", fail)
            broken.setattr("reft_ray.hf.shared_base.attach_saved", fail)
            assert "answered" not in ends(replica, 2, target)
            replica.check()
            assert "answered" not in ends(replica, 1, target)
            with pytest.raises(ReftError, match="failed 3 times in a row"):
                replica.check()
        assert ends(replica, 1, target) == ["answered"]
        replica.check()
    finally:
        replica.close()


def test_failures_of_single_requests_do_not_replace_the_replica(student, monkeypatch, tmp_path, adapters):
    folder = tmp_path / "adapter"
    shutil.copytree(adapters[0], folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 8}))
    assert all("does not fit" in end for end in ends(student, 4, Target("ft:bad", "tiny", "/m", str(folder))))
    student.check()
    monkeypatch.setattr(student.engine.base.chat, "prompt", lambda _: [10**6])
    assert all("IndexError" in end for end in ends(student, 4))
    student.check()


@pytest.mark.parametrize("shape", ["gemma", "qwen", "mixture", "sinks"])
def test_other_architectures_are_batched_too(tiny_bases, shape):
    replica = StudentReplica(str(tiny_bases[shape]), ChatArgs(device="cpu", precision="float32", max_rows=3))
    samplings = [Sampling(size, temperature=0.0) for size in (3, 40, 12, 7, 25)]

    async def run():
        alone = [said(await pieces_of(replica, sampling)) for sampling in samplings]
        talks = [pieces_of(replica, sampling) for sampling in samplings]
        return alone, [said(pieces) for pieces in await asyncio.gather(*talks)]

    try:
        alone, together = asyncio.run(run())
    finally:
        replica.close()
    assert alone == together


def test_a_real_model_gives_the_log_probabilities_of_its_tokens(student, server, llama):
    """Those of a plain forward pass, for the prompt and for what follows, in this process and over HTTP."""
    base = load_base(str(llama))
    prompt = "how can i bake bread please"
    ids = base.tokenizer(prompt)["input_ids"]
    sampling = Sampling(3, temperature=0.0, logprobs=2, echo=True)

    async def completed(model, raw):
        pieces = [piece async for piece in model.generate(BASE, raw, sampling)]
        return "".join(piece.text for piece in pieces), [item for piece in pieces for item in piece.logprobs]

    async def over_http():
        async with opened("endpoint", student, server) as model:
            return await completed(model, RawPrompt(prompt))

    text, found = asyncio.run(completed(student, RawPrompt(prompt)))
    assert text.startswith(prompt)
    assert found[0].logprob is None
    with torch.inference_mode():
        logprobs = base.model(torch.tensor([ids])).logits[0].float().log_softmax(dim=1)
    expected = [logprobs[place - 1, token].item() for place, token in enumerate(ids) if place]
    assert [item.logprob for item in found[1 : len(ids)]] == pytest.approx(expected, abs=1e-4)
    assert found[len(ids)].logprob == pytest.approx(logprobs[-1].max().item(), abs=1e-4)
    assert found[len(ids)].top[0][1] == found[len(ids)].logprob
    # The random model may end its completion early.
    assert len(ids) < len(found) <= len(ids) + 3
    assert asyncio.run(completed(student, RawPrompt(ids=tuple(ids))))[1] == found
    _, remote = asyncio.run(over_http())
    assert [item.logprob for item in remote[1:]] == pytest.approx([item.logprob for item in found[1:]], abs=1e-5)
