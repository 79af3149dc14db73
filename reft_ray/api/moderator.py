"""The interface between HTTP and the teacher: conversations in, verdicts out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from reft_ray.api.shares import OWNER, Shares, step_aside
from reft_ray.core.cascade import Rules
from reft_ray.core.conversation import Conversation
from reft_ray.core.scoring import Scorer, judge
from reft_ray.core.verdict import Thresholds, Verdict

PIECE_ROWS = 32


class ModeratorError(Exception):
    """There is no verdict. Callers answer with an error: nothing is allowed without a verdict."""


class OverloadedError(ModeratorError):
    """The teacher's queue is full; `retry_after` in seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class UnavailableError(ModeratorError):
    """No teacher answers."""


class GuardError(ModeratorError):
    """A guard next to the teacher gave no opinion."""


class DeadlineError(ModeratorError):
    """The deadline passed before the verdict."""


@dataclass(frozen=True, slots=True)
class ModerationBatch:
    """Verdicts in the order of the conversations, all of one teacher and under one version of the policy."""

    teacher: str
    verdicts: Sequence[Verdict]
    policy: str = ""


@dataclass(frozen=True, slots=True)
class TeacherInfo:
    """The public description of a teacher. `details` holds JSON values."""

    id: str
    thresholds: Thresholds
    slope: float
    intercept: float
    details: Mapping[str, object] = field(default_factory=dict)


class Moderator(Protocol):
    """Gives verdicts: a handle to teacher replicas, or a scorer in this process."""

    async def judge(
        self,
        conversations: Sequence[Conversation],
        thresholds: Thresholds | None,
        deadline: float,
        patient: bool = False,
    ) -> ModerationBatch:
        """Return one verdict per conversation, all of one teacher.

        `thresholds` of None are the teacher's. `deadline` is a time of `time.monotonic()` in this process.
        A `patient` caller waits while the teacher is overloaded; others get OverloadedError at once.
        Raises only ModeratorError. Cancelling the call removes it from the queue.
        """
        ...

    async def info(self) -> TeacherInfo:
        """Describe the current teacher. Raises UnavailableError."""
        ...


class LocalModerator:
    """A scorer in this process, one piece of a call at a time in a thread: projects take turns between pieces."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._turns, self._rows = Shares(1), Shares(1)

    async def judge(
        self,
        conversations: Sequence[Conversation],
        thresholds: Thresholds | None,
        deadline: float,
        patient: bool = False,
    ) -> ModerationBatch:
        try:
            verdicts: list[Verdict] = []
            async with asyncio.timeout(deadline - time.monotonic()):
                for first in range(0, len(conversations), PIECE_ROWS):
                    piece = conversations[first : first + PIECE_ROWS]
                    if patient:
                        await step_aside(self._rows)
                    async with self._turns.held(OWNER.get()):
                        verdicts += await asyncio.to_thread(judge, self._scorer, piece, thresholds)
        except TimeoutError:
            raise DeadlineError("the teacher did not answer in time") from None
        except Exception as error:
            raise ModeratorError(f"the teacher failed: {type(error).__name__}") from error
        limits = thresholds or self._scorer.thresholds
        return ModerationBatch(self._scorer.teacher_id, verdicts, Rules(self._scorer.teacher_id, limits).version)

    async def info(self) -> TeacherInfo:
        return info_of(self._scorer)


def info_of(scorer: Scorer, details: Mapping[str, object] | None = None) -> TeacherInfo:
    """The public description of a scorer."""
    calibration = scorer.calibration
    return TeacherInfo(
        scorer.teacher_id, scorer.thresholds, calibration.slope, calibration.intercept, dict(details or {})
    )
