"""The training worker of one base model in its own deployment; `app` makes it one, always with a single replica."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import Protocol

from reft_ray.api.moderator import Moderator
from reft_ray.api.settings import TrainingSettings
from reft_ray.core.conversation import Conversation
from reft_ray.core.errors import ReftError
from reft_ray.core.verdict import Verdict
from reft_ray.jobs.content import ContentStore
from reft_ray.jobs.database import Database
from reft_ray.jobs.driver import resolved
from reft_ray.jobs.training import TrainingStore
from reft_ray.jobs.training_queue import TrainingQueue
from reft_ray.serving.args import ServiceArgs
from reft_ray.settings import load_factory
from reft_ray.telemetry.recorder import Recorder

VERDICT_SECONDS = 120.0


class Worker(Protocol):
    """What `ServiceArgs.trainer` makes: `pipeline.training_worker.TrainingWorker`."""

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set."""
        ...


class TrainerReplica:
    """Runs the worker in a thread; its data are judged by the service's own teachers and guards.

    Must be made in the event loop that the moderator's handles belong to. It ends with its process: what it did not
    record, the next worker does once the lease has run out.
    """

    def __init__(self, name: str, service: ServiceArgs, moderator: Moderator, recorder: Recorder) -> None:
        settings = service.training or TrainingSettings()
        self._loop = asyncio.get_running_loop()
        self._moderator = moderator
        database = Database.open(resolved(service.database_url))
        store = TrainingStore(database, service.max_project_bytes, settings.max_models)
        worker: Worker = load_factory(service.trainer)(
            name,
            service.options,
            settings,
            TrainingQueue(store),
            ContentStore(service.files_uri),
            self.judge,
            recorder,
            service.chat_moderation,
        )
        self._thread = threading.Thread(target=worker.run, args=(threading.Event(),), name="training", daemon=True)
        self._thread.start()

    def judge(self, conversations: Sequence[Conversation]) -> Sequence[Verdict]:
        """Verdicts, from the worker's thread. Raises ModeratorError."""
        asked = self._moderator.judge(conversations, None, time.monotonic() + VERDICT_SECONDS, patient=True)
        return asyncio.run_coroutine_threadsafe(asked, self._loop).result().verdicts

    def check(self) -> None:
        """Raises ReftError once the worker has ended."""
        if not self._thread.is_alive():
            raise ReftError("the training worker has ended")


def trained_bases(service: ServiceArgs) -> list[str]:
    """The base models that have a trainer."""
    if service.training is None:
        return []
    return [name for name, base in service.base_models.items() if base.trainable]
