"""The seam between HTTP and the teacher: conversations in, verdicts out, or an error that says why not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from reft_ray.core.conversation import Conversation
from reft_ray.core.scoring import Scorer, judge
from reft_ray.core.verdict import Thresholds, Verdict


class ModeratorError(Exception):
    """No verdict could be had. Callers pass this on as an error; nothing is allowed without a verdict."""


class OverloadedError(ModeratorError):
    """The teacher's queue is full; `retry_after` in seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class UnavailableError(ModeratorError):
    """No teacher answers."""


class DeadlineError(ModeratorError):
    """The verdict did not come in time."""


@dataclass(frozen=True, slots=True)
class ModerationBatch:
    """Verdicts in the order of the conversations, and the teacher that gave all of them."""

    teacher: str
    verdicts: list[Verdict]


@dataclass(frozen=True, slots=True)
class TeacherInfo:
    """What is public about the teacher that answers. `details` holds JSON values."""

    id: str
    thresholds: Thresholds
    slope: float
    intercept: float
    details: Mapping[str, object] = field(default_factory=dict)


class Moderator(Protocol):
    """Where verdicts come from: a handle to teacher replicas in service, a scorer in this process in tests."""

    async def judge(
        self,
        conversations: Sequence[Conversation],
        thresholds: Thresholds | None,
        deadline: float,
        patient: bool = False,
    ) -> ModerationBatch:
        """One verdict per conversation, all by one teacher.

        `thresholds` of None are the teacher's. `deadline` is a reading of `time.monotonic()` of this process.
        A `patient` caller waits while the teacher is overloaded; others get OverloadedError at once.
        Raises ModeratorError and nothing else; cancelling the call frees its place.
        """
        ...

    async def info(self) -> TeacherInfo:
        """The teacher that answers. Raises UnavailableError."""
        ...


class LocalModerator:
    """A scorer in this process, one call at a time in a thread."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._turn = asyncio.Lock()

    async def judge(
        self,
        conversations: Sequence[Conversation],
        thresholds: Thresholds | None,
        deadline: float,
        patient: bool = False,
    ) -> ModerationBatch:
        """See Moderator."""
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                async with self._turn:
                    verdicts = await asyncio.to_thread(judge, self._scorer, conversations, thresholds)
        except TimeoutError:
            raise DeadlineError("the teacher did not answer in time") from None
        return ModerationBatch(self._scorer.teacher_id, verdicts)

    async def info(self) -> TeacherInfo:
        """See Moderator."""
        return info_of(self._scorer)


def info_of(scorer: Scorer, details: Mapping[str, object] | None = None) -> TeacherInfo:
    """The public facts of a scorer."""
    calibration = scorer.calibration
    return TeacherInfo(
        scorer.teacher_id, scorer.thresholds, calibration.slope, calibration.intercept, dict(details or {})
    )
