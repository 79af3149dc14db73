"""The online filter with guards: the same cascade as dataset screening, over asynchronous models."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from reft_ray.api.moderator import DeadlineError, GuardError, ModerationBatch, Moderator, TeacherInfo
from reft_ray.core.cascade import (
    Answers,
    Combine,
    Guard,
    GuardedVerdict,
    GuardInfo,
    Opinion,
    Order,
    Question,
    Rules,
    cascade,
)
from reft_ray.core.conversation import Conversation
from reft_ray.core.errors import ReftError
from reft_ray.core.verdict import Thresholds


class AsyncGuard(Protocol):
    """A guard that is waited for: a deployment, or a model in this process."""

    @property
    def info(self) -> GuardInfo:
        """Its id and threshold."""
        ...

    async def opinions(self, conversations: Sequence[Conversation], deadline: float) -> list[Opinion]:
        """One Opinion per conversation, in order. Raises only ModeratorError."""
        ...


class LocalGuard:
    """A guard in this process, one call at a time in a thread."""

    def __init__(self, guard: Guard) -> None:
        self.info = GuardInfo(guard.guard_id, guard.threshold)
        self._guard = guard
        self._turn = asyncio.Lock()

    async def opinions(self, conversations: Sequence[Conversation], deadline: float) -> list[Opinion]:
        try:
            async with asyncio.timeout(deadline - time.monotonic()), self._turn:
                return await asyncio.to_thread(self._guard.opinions, conversations)
        except TimeoutError:
            raise DeadlineError(f"guard {self.info.guard_id} did not answer in time") from None
        except Exception as error:
            raise GuardError(f"guard {self.info.guard_id} failed: {type(error).__name__}") from error


class GuardedModerator:
    """A Moderator whose verdicts are those of the teacher and the guards together. A guard that fails is an error."""

    def __init__(
        self,
        teacher: Moderator,
        guards: Sequence[AsyncGuard],
        combine: Combine = Combine.ANY,
        order: Order = Order.AFTER,
    ) -> None:
        self._teacher = teacher
        self._guards = list(guards)
        self._infos = tuple(guard.info for guard in guards)
        self._combine, self._order = combine, order

    async def judge(
        self,
        conversations: Sequence[Conversation],
        thresholds: Thresholds | None,
        deadline: float,
        patient: bool = False,
    ) -> ModerationBatch:
        rules = self._rules(await self._teacher.info(), thresholds)
        teacher = rules.teacher

        async def answers(question: Question) -> Answers:
            nonlocal teacher
            asked = [conversations[index] for index in question.rows]
            if question.guard is not None:
                return await self._guards[question.guard].opinions(asked, deadline)
            batch = await self._teacher.judge(asked, thresholds, deadline, patient)
            teacher = batch.teacher
            return batch.verdicts

        run = cascade(rules, len(conversations))
        try:
            question = next(run)
            while True:
                question = run.send(await answers(question))
        except StopIteration as end:
            verdicts: list[GuardedVerdict] = end.value
        except ReftError as error:
            raise GuardError(str(error)) from error
        return ModerationBatch(teacher, list(verdicts), replace(rules, teacher=teacher).version)

    async def info(self) -> TeacherInfo:
        """The teacher's description with the guards and the version of the policy."""
        found = await self._teacher.info()
        rules = self._rules(found, None)
        return replace(found, details={**found.details, **_about(rules), "policy": rules.version})

    def _rules(self, teacher: TeacherInfo, thresholds: Thresholds | None) -> Rules:
        return Rules(teacher.id, thresholds or teacher.thresholds, self._infos, self._combine, self._order)


def _about(rules: Rules) -> dict[str, object]:
    return {name: value for name, value in rules.judges.items() if name in ("guards", "combine", "order")}
