"""The gateway's moderator: calls to the Teacher and Guard deployments, with retries while replicas are lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

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

from reft_ray.api.guarded import GuardedModerator
from reft_ray.api.moderator import (
    DeadlineError,
    GuardError,
    ModerationBatch,
    Moderator,
    ModeratorError,
    OverloadedError,
    TeacherInfo,
    UnavailableError,
)
from reft_ray.api.shares import OWNER
from reft_ray.core.cascade import GuardInfo, Opinion
from reft_ray.core.conversation import Conversation
from reft_ray.core.verdict import Thresholds
from reft_ray.guards.settings import CascadeSettings
from reft_ray.telemetry import catalog
from reft_ray.telemetry.recorder import Recorder

T = TypeVar("T")

LOST = (
    RayActorError,
    ReplicaUnavailableError,
    WorkerCrashedError,
    NodeDiedError,
    ObjectLostError,
    OwnerDiedError,
    RpcError,
)
"""Errors of a call whose replica was lost; scoring is idempotent, so it may be retried."""

_INFO_CACHE_SECONDS = 2.0
_INFO_TIMEOUT_SECONDS = 5.0
_MIN_BACKOFF_SECONDS = 0.05
_MAX_BACKOFF_SECONDS = 1.0


class HandleModerator:
    """`api.moderator.Moderator` over a Serve deployment; retries lost calls until the deadline."""

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
        async def judged(left: float) -> ModerationBatch | None:
            return await self._handle.judge.remote(conversations, thresholds, left, not patient, OWNER.get())

        batch = await answer("teacher", judged, deadline, patient, self._recorder)
        if len(batch.verdicts) != len(conversations):
            raise ModeratorError(f"the teacher returned {len(batch.verdicts)} verdicts for {len(conversations)} rows")
        return batch

    async def info(self) -> TeacherInfo:
        """The teacher's description, cached for two seconds."""
        if self._info is None or time.monotonic() >= self._info_until:
            try:
                async with asyncio.timeout(_INFO_TIMEOUT_SECONDS):
                    self._info = await self._handle.info.remote()
            except Exception:
                raise UnavailableError("no teacher answers") from None
            self._info_until = time.monotonic() + _INFO_CACHE_SECONDS
        return self._info


class HandleGuard:
    """`api.guarded.AsyncGuard` over the Serve deployment of a guard; retries lost calls until the deadline."""

    def __init__(self, info: GuardInfo, handle: DeploymentHandle, recorder: Recorder) -> None:
        self.info = info
        self._handle = handle
        self._recorder = recorder

    async def opinions(self, conversations: Sequence[Conversation], deadline: float) -> list[Opinion]:
        async def asked(left: float) -> list[Opinion] | None:
            return await self._handle.opinions.remote(conversations, left)

        return await answer(f"guard {self.info.guard_id}", asked, deadline, True, self._recorder, GuardError)


def moderator_of(
    teachers: DeploymentHandle, guards: Sequence[DeploymentHandle], cascade: CascadeSettings, recorder: Recorder
) -> Moderator:
    """The teachers, with the guards next to them where there are any."""
    moderator: Moderator = HandleModerator(teachers, recorder)
    if not guards:
        return moderator
    asked = [
        HandleGuard(GuardInfo(settings.title, settings.threshold), handle, recorder)
        for settings, handle in zip(cascade.guards, guards, strict=True)
    ]
    return GuardedModerator(moderator, asked, cascade.combine, cascade.order)


async def answer(
    name: str,
    call: Callable[[float], Awaitable[T | None]],
    deadline: float,
    patient: bool,
    recorder: Recorder,
    failure: type[ModeratorError] = ModeratorError,
) -> T:
    """What a deployment answers: `call` takes the seconds left and gives None where they did not suffice.

    Raises ModeratorError: OverloadedError at once unless the caller is `patient`, `failure` where the model failed.
    """
    backoff = _MIN_BACKOFF_SECONDS
    lost = False
    while (left := deadline - time.monotonic()) > 0:
        try:
            async with asyncio.timeout(left):
                found = await call(left)
        except TimeoutError:
            break
        except BackPressureError:
            if not patient:
                raise OverloadedError(f"the {name}'s queue is full") from None
        except LOST:
            lost = True
        except DeploymentUnavailableError as error:
            raise UnavailableError(str(error)) from None
        except Exception as error:  # over gRPC a replica's error has its own type, not RayError
            raise failure(f"the {name} failed: {type(error).__name__}") from error
        else:
            if found is None:
                break
            return found
        recorder.count(catalog.FILTER_RETRIES)
        await asyncio.sleep(min(backoff, max(0.0, deadline - time.monotonic())))
        backoff = min(2 * backoff, _MAX_BACKOFF_SECONDS)
    if lost:
        raise UnavailableError(f"the {name}'s replica was lost and not replaced in time")
    raise DeadlineError("no verdict in time")
