"""The gateway's handles: lost calls are retried, overload and timeouts are errors, nothing becomes an allow."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RaySystemError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from reft_ray.api.chat_model import ChatError, ChatOverloadedError, ContextLengthError, Target
from reft_ray.api.moderator import DeadlineError, ModerationBatch, ModeratorError, OverloadedError, UnavailableError
from reft_ray.api.shares import OWNER
from reft_ray.core.completion import Piece, Sampling
from reft_ray.core.conversation import chat
from reft_ray.core.scoring import judge
from reft_ray.serving.chat import HandleChat
from reft_ray.serving.handle import HandleModerator
from reft_ray.telemetry import catalog
from reft_ray.telemetry.recorder import MemoryRecorder
from reft_ray.testbed.word_scorer import WordScorer

ROWS = [chat("Good morning."), chat("Build a bomb.")]
RIGHT = ModerationBatch("rt-words", judge(WordScorer(), ROWS))
FULL = BackPressureError(3, 3)
NOBODY = DeploymentUnavailableError(DeploymentID("Teacher", "reft"))


class Script:
    """A fake deployment handle with one outcome after another; the last one repeats."""

    def __init__(self, *outcomes: Any) -> None:
        self._outcomes = list(outcomes)
        self.calls: list[tuple[Any, ...]] = []
        self.judge = self.info = self

    async def remote(self, *arguments: Any) -> Any:
        self.calls.append(arguments)
        outcome = self._outcomes.pop(0) if len(self._outcomes) > 1 else self._outcomes[0]
        if isinstance(outcome, Exception):
            raise outcome
        if outcome is asyncio.Event:
            await asyncio.Event().wait()
        return outcome


def ask(script: Script, seconds: float = 5, patient: bool = False) -> tuple[ModerationBatch, MemoryRecorder]:
    async def run() -> tuple[ModerationBatch, MemoryRecorder]:
        OWNER.set("proj-a")
        recorder = MemoryRecorder()
        moderator = HandleModerator(script, recorder)  # type: ignore[arg-type]
        return await moderator.judge(ROWS, None, time.monotonic() + seconds, patient), recorder

    return asyncio.run(run())


def test_verdicts_are_returned_and_the_remaining_time_and_the_project_are_passed_on() -> None:
    script = Script(RIGHT)
    judgement, recorder = ask(script)
    assert judgement == RIGHT
    ((conversations, thresholds, left, urgent, owner),) = script.calls
    assert (conversations, thresholds, urgent, owner) == (ROWS, None, True, "proj-a")
    assert 4 < left <= 5
    assert recorder.total(catalog.FILTER_RETRIES) == 0


def test_a_lost_call_is_retried() -> None:
    script = Script(ActorDiedError(), ActorDiedError(), RIGHT)
    judgement, recorder = ask(script)
    assert judgement == RIGHT
    assert recorder.total(catalog.FILTER_RETRIES) == 2


def test_a_patient_call_outlasts_a_full_queue() -> None:
    judgement, _ = ask(Script(FULL, FULL, RIGHT), patient=True)
    assert judgement == RIGHT


@pytest.mark.parametrize(
    ("script", "seconds", "error"),
    [
        (lambda: Script(FULL), 5, OverloadedError),
        (lambda: Script(NOBODY), 5, UnavailableError),
        (lambda: Script(ActorDiedError()), 0.2, UnavailableError),
        (lambda: Script(asyncio.Event), 0.1, DeadlineError),
        (lambda: Script(None), 5, DeadlineError),
        (lambda: Script(RIGHT), -1, DeadlineError),
        (lambda: Script(RaySystemError("broken")), 5, ModeratorError),
        (lambda: Script(RuntimeError("as gRPC brings it")), 5, ModeratorError),
        (lambda: Script(ModerationBatch("rt-words", RIGHT.verdicts[:1])), 5, ModeratorError),
    ],
)
def test_without_verdicts_there_is_an_error(
    script: Callable[[], Script], seconds: float, error: type[Exception]
) -> None:
    with pytest.raises(ModeratorError) as raised:
        ask(script(), seconds)
    assert type(raised.value) is error


def test_the_teachers_description_is_cached() -> None:
    async def run() -> None:
        script = Script(RIGHT)
        moderator = HandleModerator(script, MemoryRecorder())  # type: ignore[arg-type]
        await moderator.info()
        await moderator.info()
        assert len(script.calls) == 1
        for failure in (ActorDiedError(), RuntimeError("as gRPC brings it")):
            with pytest.raises(UnavailableError):
                await HandleModerator(Script(failure), MemoryRecorder()).info()  # type: ignore[arg-type]

    asyncio.run(run())


class Talk:
    """A fake handle of students that yields some pieces and then fails."""

    def __init__(self, *items: Any) -> None:
        self._items = items
        self.stream = self
        self.cancelled = False

    def options(self, **_: Any) -> "Talk":
        return self

    def remote(self, *_: Any) -> "Talk":
        return self

    def cancel(self) -> None:
        self.cancelled = True

    async def __aiter__(self) -> AsyncIterator[Any]:
        for item in self._items:
            if isinstance(item, Exception) and not isinstance(item, ChatError):
                raise item
            yield item


@pytest.mark.parametrize(
    ("failure", "error", "says"),
    [
        (RuntimeError("as gRPC brings it"), ChatError, "the model failed: RuntimeError"),
        (RaySystemError("broken"), ChatError, "the model failed: RaySystemError"),
        (FULL, ChatOverloadedError, "full"),
        (ContextLengthError("512 tokens at most"), ContextLengthError, "512"),
    ],
)
def test_a_completion_that_fails_is_a_chat_error(failure: Exception, error: type[Exception], says: str) -> None:
    talk = Talk(Piece("word "), failure)

    async def run() -> None:
        async for piece in HandleChat(talk).generate(  # type: ignore[arg-type]
            Target("m", "m", "/m"), ROWS[0], Sampling(4)
        ):
            assert piece.text == "word "

    with pytest.raises(ChatError, match=says) as raised:
        asyncio.run(run())
    assert type(raised.value) is error
    assert talk.cancelled
