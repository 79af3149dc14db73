"""The filter's application with the word scorer, in this process or on a loopback server."""

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread

import pytest
import uvicorn
from fastapi import FastAPI

from reft_ray.api.filter_app import create_filter_app
from reft_ray.api.moderator import LocalModerator, ModerationBatch, TeacherInfo
from reft_ray.api.settings import FilterSettings
from reft_ray.core.conversation import Conversation
from reft_ray.core.verdict import Thresholds
from reft_ray.telemetry.recorder import MemoryRecorder
from reft_ray.testbed.word_scorer import WordScorer

Live = Callable[[FastAPI], AbstractContextManager[str]]


@dataclass
class TroubledModerator:
    """The word scorer, after configurable errors and pauses."""

    failures: list[Exception] = field(default_factory=list)
    gate: asyncio.Event | None = None
    calls: int = 0
    waiting: int = 0
    most_waiting: int = 0
    teacher_id: str = "rt-words"
    scorer: type[WordScorer] = WordScorer

    async def judge(
        self,
        conversations: Sequence[Conversation],
        thresholds: Thresholds | None,
        deadline: float,
        patient: bool = False,
    ) -> ModerationBatch:
        self.calls += 1
        self.waiting += 1
        self.most_waiting = max(self.most_waiting, self.waiting)
        try:
            if self.failures:
                raise self.failures.pop(0)
            if self.gate is not None:
                await self.gate.wait()
            return await LocalModerator(self.scorer(self.teacher_id)).judge(
                conversations, thresholds, deadline, patient
            )
        finally:
            self.waiting -= 1

    async def info(self) -> TeacherInfo:
        return await LocalModerator(self.scorer(self.teacher_id)).info()


@dataclass
class FilterApp:
    """An application with its moderator and recorder."""

    judge: TroubledModerator
    recorder: MemoryRecorder
    app: FastAPI


@pytest.fixture
def make_filter(tmp_path: Path) -> Callable[..., FilterApp]:
    def make(**settings: object) -> FilterApp:
        judge, recorder = TroubledModerator(), MemoryRecorder()
        app = create_filter_app(
            judge,
            FilterSettings(hosts=("filter",), **settings),
            screenings_uri=str(tmp_path / "screenings"),
            recorder=recorder,
        )
        return FilterApp(judge, recorder, app)

    return make


@pytest.fixture
def live() -> Live:
    """Serve an application on loopback during the block."""

    @contextmanager
    def serve(app: FastAPI) -> Iterator[str]:
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=2))
        thread = Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            until = time.monotonic() + 10
            while not server.started:
                assert time.monotonic() < until, "the server does not start"
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
            listener.close()

    return serve


def _row(text: str) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": text}]}).encode()


@pytest.fixture
def row() -> Callable[[str], bytes]:
    """A line of chat JSONL with one user turn."""
    return _row
