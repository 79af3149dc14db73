"""The Teacher deployment of a Serve application on this cluster, as a `screening.guards.Teacher`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from ray import serve

from reft_ray.api.moderator import ModeratorError
from reft_ray.core.conversation import Conversation
from reft_ray.core.errors import ReftError
from reft_ray.core.verdict import Thresholds, Verdict
from reft_ray.serving.app import TEACHER
from reft_ray.serving.handle import HandleModerator
from reft_ray.telemetry.recorder import NullRecorder

SECONDS = 600.0
"""How long a batch waits for replicas that are busy or being replaced."""


class ServeTeacher:
    """Calls the replicas by handle, without HTTP; lost calls are repeated. Raises ReftError when they do not answer,
    or when the teacher changes."""

    def __init__(self, application: str) -> None:
        # A loop of its own: the handle's calls belong to the loop in which they are made.
        self._loop = asyncio.new_event_loop()
        self._moderator = HandleModerator(serve.get_deployment_handle(TEACHER, application), NullRecorder())
        about = self._loop.run_until_complete(self._moderator.info())
        self.teacher_id, self.thresholds = about.id, about.thresholds

    def judge(self, conversations: Sequence[Conversation], thresholds: Thresholds | None) -> list[Verdict]:
        """One verdict per conversation, in order."""
        deadline = time.monotonic() + SECONDS
        answer = self._moderator.judge(conversations, thresholds, deadline, patient=True)
        try:
            batch = self._loop.run_until_complete(answer)
        except ModeratorError as error:
            raise ReftError(f"the service does not answer: {error}") from error
        if batch.teacher != self.teacher_id:
            raise ReftError(f"the service changed its teacher from {self.teacher_id} to {batch.teacher}; run again")
        return list(batch.verdicts)
