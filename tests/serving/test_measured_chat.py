"""Chat metrics are recorded around any engine."""

import asyncio
from contextlib import aclosing

import pytest

from reft_ray.api.chat_model import ChatError, ChatOverloadedError, EchoChat, Target
from reft_ray.core.completion import Sampling
from reft_ray.core.conversation import chat
from reft_ray.serving.measured_chat import MeasuredChat
from reft_ray.telemetry import catalog as c
from reft_ray.telemetry.recorder import MemoryRecorder

STUDENT = Target("ft:tiny", "tiny", "/m", "/adapter")
SAY = chat("one two three")


class Failing:
    def __init__(self, error: Exception) -> None:
        self._error = error

    async def generate(self, target, conversation, sampling):
        raise self._error
        yield


def use(model, pieces: int | None = None) -> MemoryRecorder:
    recorder = MemoryRecorder()

    async def read() -> None:
        async with aclosing(MeasuredChat(model, recorder).generate(STUDENT, SAY, Sampling(8))) as stream:
            count = 0
            async for _ in stream:
                assert recorder.total(c.CHAT_RUNNING) == 1
                count += 1
                if count == pieces:
                    return

    try:
        asyncio.run(read())
    finally:
        assert recorder.total(c.CHAT_RUNNING) == 0
    return recorder


def test_a_completion_is_measured():
    seen = use(EchoChat())
    assert seen.total(c.CHAT_REQUESTS, model="student", outcome="completed") == 1
    assert seen.total(c.CHAT_TOKENS, kind="prompt") == seen.total(c.CHAT_TOKENS, kind="completion") == 3
    (first,), (between,) = seen.observations(c.CHAT_FIRST_TOKEN_SECONDS), seen.observations(c.CHAT_TOKEN_SECONDS)
    assert first > 0
    assert between > 0


def test_a_client_that_leaves_is_counted_with_its_tokens():
    seen = use(EchoChat(), pieces=1)
    assert seen.total(c.CHAT_REQUESTS, outcome="cancelled") == seen.total(c.CHAT_REQUESTS) == 1
    assert seen.total(c.CHAT_TOKENS, kind="completion") == 1


@pytest.mark.parametrize(
    ("error", "outcome"), [(ChatOverloadedError("full"), "overloaded"), (ChatError("broken"), "failed")]
)
def test_failures_have_their_own_outcomes(error, outcome):
    recorder = MemoryRecorder()

    async def read() -> None:
        async for _ in MeasuredChat(Failing(error), recorder).generate(STUDENT, SAY, Sampling(8)):
            pass

    with pytest.raises(type(error)):
        asyncio.run(read())
    assert recorder.total(c.CHAT_REQUESTS, outcome=outcome) == recorder.total(c.CHAT_REQUESTS) == 1
    assert recorder.observations(c.CHAT_FIRST_TOKEN_SECONDS) == []
