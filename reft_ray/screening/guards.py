"""Who decides about a row: the Ref-Teacher, alone or together with a second guard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol, runtime_checkable

from reft_ray.core.conversation import Conversation
from reft_ray.core.decoding import readings
from reft_ray.core.errors import ReftError, UsageError
from reft_ray.core.scoring import Scorer, judge
from reft_ray.core.verdict import Decision, Thresholds, Verdict

Decode = Callable[[str], list[tuple[str | None, str]]]


@runtime_checkable
class Teacher(Protocol):
    """A Ref-Teacher that judges whole conversations itself, as the one behind a service does."""

    @property
    def teacher_id(self) -> str:
        """Which teacher judges."""
        ...

    @property
    def thresholds(self) -> Thresholds:
        """Its own thresholds."""
        ...

    def judge(self, conversations: Sequence[Conversation], thresholds: Thresholds | None) -> list[Verdict]:
        """One verdict per conversation, in order; `thresholds` of None are its own. An error stops the run."""
        ...


@runtime_checkable
class Guard(Protocol):
    """A second opinion: the probability in [0, 1] that a conversation is harmful; `threshold` and above is flagged."""

    @property
    def guard_id(self) -> str:
        """The name under which reports know the guard."""
        ...

    @property
    def threshold(self) -> float:
        """The probability from which a row is flagged."""
        ...

    def probabilities(self, conversations: Sequence[Conversation]) -> list[float]:
        """One probability per conversation, in order. An error stops the run: rows are never waved through."""
        ...


class Combine(StrEnum):
    """How two opinions become one.

    `ANY`: blocked when either says so. `ALL`: a row is withheld only where the guard flags it too. `GREY_BAND`: the
    guard settles what the teacher would send to a person, and nothing else.
    """

    ANY = "any"
    ALL = "all"
    GREY_BAND = "grey-band"


class Order(StrEnum):
    """Whether the guard sees rows after the teacher or before it; the second is spared what the first settles."""

    AFTER = "after"
    BEFORE = "before"


@dataclass(frozen=True, slots=True)
class Ruling:
    """The verdict on a row and who decided: the id of the teacher or of the guard, or both joined by `+`."""

    verdict: Verdict
    teacher: str
    decided_by: str
    guard_score: float | None = None

    @property
    def by_teacher(self) -> bool:
        """Whether the teacher's score settled it, alone or together with the guard."""
        return self.decided_by.startswith(self.teacher)


class Cascade:
    """Rules on conversations with a teacher and, where given, a guard."""

    def __init__(
        self,
        teacher: Scorer | Teacher,
        guard: Guard | None = None,
        combine: Combine = Combine.ANY,
        order: Order = Order.AFTER,
        thresholds: Thresholds | None = None,
        decode: Decode = readings,
    ) -> None:
        if combine is Combine.GREY_BAND and order is Order.BEFORE:
            raise UsageError("grey-band asks the guard about the teacher's unsure rows, so the guard comes after")
        self.teacher = teacher
        self.guard = guard
        self.combine = combine
        self.order = order
        self.thresholds = thresholds or teacher.thresholds
        self._asked = thresholds
        self._decode = decode

    def rule(self, conversations: Sequence[Conversation]) -> list[Ruling]:
        """One ruling per conversation, in order."""
        if self.guard is None:
            return [self._by_teacher(verdict) for verdict in self._teacher(conversations)]
        if self.order is Order.BEFORE:
            return self._guard_first(self.guard, conversations)
        return self._teacher_first(self.guard, conversations)

    def _teacher_first(self, guard: Guard, conversations: Sequence[Conversation]) -> list[Ruling]:
        verdicts = self._teacher(conversations)
        unsettled = {
            Combine.ANY: (Decision.ALLOW, Decision.REVIEW),
            Combine.ALL: (Decision.REVIEW, Decision.BLOCK),
            Combine.GREY_BAND: (Decision.REVIEW,),
        }[self.combine]
        asked = [index for index, verdict in enumerate(verdicts) if verdict.decision in unsettled]
        scores = dict(zip(asked, self._ask(guard, [conversations[index] for index in asked]), strict=True))
        return [
            self._combined(guard, verdict, scores[index]) if index in scores else self._by_teacher(verdict)
            for index, verdict in enumerate(verdicts)
        ]

    def _guard_first(self, guard: Guard, conversations: Sequence[Conversation]) -> list[Ruling]:
        scores = self._ask(guard, conversations)
        settled = self.combine is Combine.ANY
        asked = [index for index, score in enumerate(scores) if (score >= guard.threshold) is not settled]
        verdicts = dict(zip(asked, self._teacher([conversations[index] for index in asked]), strict=True))
        return [
            self._combined(guard, verdicts[index], score) if index in verdicts else self._by_guard(guard, score)
            for index, score in enumerate(scores)
        ]

    def _combined(self, guard: Guard, verdict: Verdict, score: float) -> Ruling:
        """Both opinions are known; the ruling names whoever settled it."""
        teacher, other = self.teacher.teacher_id, guard.guard_id
        flagged = score >= guard.threshold
        if self.combine is Combine.ALL:
            if verdict.decision is Decision.ALLOW:
                return self._by_teacher(verdict, score)
            if flagged:
                return Ruling(verdict, teacher, f"{teacher}+{other}", score)
        if flagged:
            return Ruling(replace(verdict, decision=Decision.BLOCK), teacher, other, score)
        if self.combine is Combine.ANY:
            return self._by_teacher(verdict, score)
        return Ruling(replace(verdict, decision=Decision.ALLOW), teacher, other, score)

    def _by_guard(self, guard: Guard, score: float) -> Ruling:
        """The teacher was not asked: the verdict carries the guard's probability, mapped to [-1, 1], as its score."""
        decision = Decision.BLOCK if score >= guard.threshold else Decision.ALLOW
        verdict = Verdict(decision, 2 * score - 1, score, 2 * guard.threshold - 1, part="", windows=0)
        return Ruling(verdict, self.teacher.teacher_id, guard.guard_id, score)

    def _by_teacher(self, verdict: Verdict, score: float | None = None) -> Ruling:
        return Ruling(verdict, self.teacher.teacher_id, self.teacher.teacher_id, score)

    def _teacher(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        if isinstance(self.teacher, Teacher):
            verdicts = self.teacher.judge(conversations, self._asked) if conversations else []
            if len(verdicts) != len(conversations):
                raise ReftError(
                    f"teacher {self.teacher.teacher_id}: {len(conversations)} rows, {len(verdicts)} verdicts"
                )
            return verdicts
        return judge(self.teacher, conversations, self.thresholds, self._decode)

    def _ask(self, guard: Guard, conversations: Sequence[Conversation]) -> list[float]:
        scores = guard.probabilities(conversations) if conversations else []
        if len(scores) != len(conversations) or not all(0.0 <= score <= 1.0 for score in scores):
            raise ReftError(f"guard {guard.guard_id}: expected {len(conversations)} probabilities in [0, 1]")
        return scores
