"""The gateway's side of the teacher: one handle, retries for lost replicas, and an error rather than a guess."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OwnerDiedError,
    RayActorError,
    RpcError,
    WorkerCrashedError,
)
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from reft_ray.api.moderator import (
    DeadlineError,
    ModerationBatch,
    ModeratorError,
    OverloadedError,
    TeacherInfo,
    UnavailableError,
)
from reft_ray.core.conversation import Conversation
from reft_ray.core.verdict import Thresholds
from reft_ray.telemetry import catalog
from reft_ray.telemetry.recorder import Recorder

LOST = (
    RayActorError,
    ReplicaUnavailableError,
    WorkerCrashedError,
    NodeDiedError,
    ObjectLostError,
    OwnerDiedError,
    RpcError,
)
"""What a call says when its replica went away; judging again is safe, for nothing is changed by it."""

_INFO_SECONDS = 2.0
_INFO_PATIENCE = 5.0
_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 1.0


class HandleModerator:
    """`api.moderator.Moderator` over a Serve deployment; also retries calls in flight, up to the deadline."""

    def __init__(self, handle: DeploymentHandle, recorder: Recorder) -> None:
        self._handle = handle
        self._recorder = recorder
        self._info: TeacherInfo | None = None
        self._info_until = 0.0

    async def judge(
        self,
        conversations: Sequence[Conversation],
        thresholds: Thresholds | None,
        deadline: float,
        patient: bool = False,
    ) -> ModerationBatch:
        """See Moderator."""
        pause = _FIRST_PAUSE
        lost = False
        while (left := deadline - time.monotonic()) > 0:
            try:
                async with asyncio.timeout(left):
                    judgement = await self._handle.judge.remote(conversations, thresholds, left, not patient)
            except TimeoutError:
                break
            except BackPressureError:
                if not patient:
                    raise OverloadedError("the teacher's queue is full") from None
            except LOST:
                lost = True
            except DeploymentUnavailableError as error:
                raise UnavailableError(str(error)) from None
            except Exception as error:  # by gRPC a replica's error comes as its own type, not as a RayError
                raise ModeratorError(f"the teacher failed: {type(error).__name__}") from error
            else:
                if judgement is None:
                    break
                return self._complete(judgement, len(conversations))
            self._recorder.count(catalog.FILTER_RETRIES)
            await asyncio.sleep(min(pause, max(0.0, deadline - time.monotonic())))
            pause = min(2 * pause, _LONGEST_PAUSE)
        if lost:
            raise UnavailableError("the teacher was lost and did not come back in time")
        raise DeadlineError("no verdict came in time")

    async def info(self) -> TeacherInfo:
        """See Moderator; remembered for two seconds."""
        if self._info is None or time.monotonic() >= self._info_until:
            try:
                async with asyncio.timeout(_INFO_PATIENCE):
                    self._info = await self._handle.info.remote()
            except Exception:
                raise UnavailableError("no teacher answers") from None
            self._info_until = time.monotonic() + _INFO_SECONDS
        return self._info

    @staticmethod
    def _complete(judgement: ModerationBatch, rows: int) -> ModerationBatch:
        if len(judgement.verdicts) != rows:
            raise ModeratorError(f"the teacher gave {len(judgement.verdicts)} verdicts on {rows} rows")
        return judgement
