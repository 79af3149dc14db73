"""Verdicts on rows by the Ref-Teacher, alone or together with a second guard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

from reft_ray.core.conversation import Conversation
from reft_ray.core.decoding import readings
from reft_ray.core.errors import ReftError, UsageError
from reft_ray.core.scoring import Scorer, judge
from reft_ray.core.verdict import Decision, Thresholds, Verdict

Decode = Callable[[str], list[tuple[str | None, str]]]


@runtime_checkable
class Teacher(Protocol):
    """A Ref-Teacher that judges whole conversations itself, such as one over HTTP."""

    @property
    def teacher_id(self) -> str:
        """Identifier of the teacher."""
        ...

    @property
    def thresholds(self) -> Thresholds:
        """Its own thresholds."""
        ...

    def judge(self, conversations: Sequence[Conversation], thresholds: Thresholds | None) -> list[Verdict]:
        """One verdict per conversation, in order; `thresholds` default to its own. An error stops the run."""
        ...


@runtime_checkable
class Guard(Protocol):
    """A second model: the probability in [0, 1] that a conversation is harmful; `threshold` and above is flagged."""

    @property
    def guard_id(self) -> str:
        """Identifier of the guard in reports."""
        ...

    @property
    def threshold(self) -> float:
        """The lowest probability that is flagged."""
        ...

    def probabilities(self, conversations: Sequence[Conversation]) -> list[float]:
        """One probability per conversation, in order. An error stops the run: no row passes unjudged."""
        ...


class Combine(StrEnum):
    """How the two verdicts are combined.

    `ANY`: blocked when either blocks. `ALL`: withheld only where the guard flags the row too. `GREY_BAND`: the guard
    decides only about rows that the teacher sends to review.
    """

    ANY = "any"
    ALL = "all"
    GREY_BAND = "grey-band"


class Order(StrEnum):
    """Whether the guard judges rows after the teacher or before it; the second skips rows that the first decided."""

    AFTER = "after"
    BEFORE = "before"


@dataclass(frozen=True, slots=True)
class GuardedVerdict(Verdict):
    """A verdict with the models that made it: `decided_by` is the id of the teacher or of the guard, or both joined
    by `+`. `guard_score` is None where the guard was not asked. `offset` is what the thresholds were raised by for an
    answer; `by_job_threshold` marks a row that only the dataset's own threshold withholds."""

    teacher: str = ""
    decided_by: str = ""
    guard_score: float | None = None
    offset: float = 0.0
    by_job_threshold: bool = False

    @property
    def prompt_score(self) -> float | None:
        """The score on the scale of prompts; None where the teacher scored no text."""
        return self.score - self.offset if self.windows else None

    @property
    def by_teacher(self) -> bool:
        """Whether the teacher's score decided, alone or together with the guard."""
        return self.decided_by.startswith(self.teacher)

    @property
    def guarded_reason(self) -> str:
        """The label `reason` of the metrics."""
        if self.decision is Decision.ALLOW:
            return "clear"
        if self.by_job_threshold:
            return "job_threshold"
        return self.reason if self.by_teacher else "guard"


class GuardEnsemble:
    """Judges conversations with a teacher and, where given, a guard."""

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
            raise UsageError("grey-band asks the guard about rows that the teacher sends to review: use order after")
        self.teacher = teacher
        self.guard = guard
        self.combine = combine
        self.order = order
        self.thresholds = thresholds or teacher.thresholds
        self._requested = thresholds
        self._decode = decode

    def judge(self, conversations: Sequence[Conversation]) -> list[GuardedVerdict]:
        """One verdict per conversation, in order."""
        if self.guard is None:
            return [self._by_teacher(verdict) for verdict in self._teacher(conversations)]
        if self.order is Order.BEFORE:
            return self._guard_first(self.guard, conversations)
        return self._teacher_first(self.guard, conversations)

    def _teacher_first(self, guard: Guard, conversations: Sequence[Conversation]) -> list[GuardedVerdict]:
        verdicts = self._teacher(conversations)
        undecided = {
            Combine.ANY: (Decision.ALLOW, Decision.REVIEW),
            Combine.ALL: (Decision.REVIEW, Decision.BLOCK),
            Combine.GREY_BAND: (Decision.REVIEW,),
        }[self.combine]
        asked = [index for index, verdict in enumerate(verdicts) if verdict.decision in undecided]
        scores = dict(zip(asked, self._ask(guard, [conversations[index] for index in asked]), strict=True))
        return [
            self._combined(guard, verdict, scores[index]) if index in scores else self._by_teacher(verdict)
            for index, verdict in enumerate(verdicts)
        ]

    def _guard_first(self, guard: Guard, conversations: Sequence[Conversation]) -> list[GuardedVerdict]:
        scores = self._ask(guard, conversations)
        decided = self.combine is Combine.ANY
        asked = [index for index, score in enumerate(scores) if (score >= guard.threshold) is not decided]
        verdicts = dict(zip(asked, self._teacher([conversations[index] for index in asked]), strict=True))
        return [
            self._combined(guard, verdicts[index], score) if index in verdicts else self._by_guard(guard, score)
            for index, score in enumerate(scores)
        ]

    def _combined(self, guard: Guard, verdict: Verdict, score: float) -> GuardedVerdict:
        """The verdict where both scores are known."""
        flagged = score >= guard.threshold
        if self.combine is Combine.ALL:
            if verdict.decision is Decision.ALLOW:
                return self._by_teacher(verdict, score)
            if flagged:
                return self._with_models(verdict, f"{self.teacher.teacher_id}+{guard.guard_id}", score)
        if flagged:
            return self._with_models(replace(verdict, decision=Decision.BLOCK), guard.guard_id, score)
        if self.combine is Combine.ANY:
            return self._by_teacher(verdict, score)
        return self._with_models(replace(verdict, decision=Decision.ALLOW), guard.guard_id, score)

    def _by_guard(self, guard: Guard, score: float) -> GuardedVerdict:
        """The teacher was not asked: the score is the guard's probability, mapped to [-1, 1]."""
        decision = Decision.BLOCK if score >= guard.threshold else Decision.ALLOW
        verdict = Verdict(decision, 2 * score - 1, score, 2 * guard.threshold - 1, part="", windows=0)
        return self._with_models(verdict, guard.guard_id, score)

    def _by_teacher(self, verdict: Verdict, score: float | None = None) -> GuardedVerdict:
        return self._with_models(verdict, self.teacher.teacher_id, score)

    def _with_models(self, verdict: Verdict, decided_by: str, guard_score: float | None) -> GuardedVerdict:
        values: dict[str, Any] = {field.name: getattr(verdict, field.name) for field in fields(Verdict)}
        # A teacher over HTTP reports the threshold that it applied, not the offset.
        offset = max(0.0, verdict.threshold - self.thresholds.block) if verdict.windows else 0.0
        teacher = self.teacher.teacher_id
        return GuardedVerdict(**values, teacher=teacher, decided_by=decided_by, guard_score=guard_score, offset=offset)

    def _teacher(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        if isinstance(self.teacher, Teacher):
            verdicts = self.teacher.judge(conversations, self._requested) if conversations else []
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
