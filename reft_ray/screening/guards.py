"""Verdicts on rows by the Ref-Teacher, alone or together with guards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from reft_ray.core.cascade import Answers, Combine, Guard, GuardedVerdict, GuardInfo, Order, Question, Rules, cascade
from reft_ray.core.conversation import Conversation
from reft_ray.core.decoding import readings
from reft_ray.core.scoring import Scorer, judge
from reft_ray.core.verdict import Thresholds, Verdict

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


class GuardEnsemble:
    """Judges conversations with a teacher and guards, by the rules of `core.cascade`."""

    def __init__(
        self,
        teacher: Scorer | Teacher,
        guards: Sequence[Guard] = (),
        combine: Combine = Combine.ANY,
        order: Order = Order.AFTER,
        thresholds: Thresholds | None = None,
        decode: Decode = readings,
    ) -> None:
        self.teacher = teacher
        self.guards = list(guards)
        infos = tuple(GuardInfo(guard.guard_id, guard.threshold) for guard in guards)
        self.rules = Rules(teacher.teacher_id, thresholds or teacher.thresholds, infos, combine, order)
        self._requested = thresholds
        self._decode = decode

    def judge(self, conversations: Sequence[Conversation]) -> list[GuardedVerdict]:
        """One verdict per conversation, in order."""
        run = cascade(self.rules, len(conversations))
        try:
            question = next(run)
            while True:
                question = run.send(self._answers(question, [conversations[index] for index in question.rows]))
        except StopIteration as end:
            verdicts: list[GuardedVerdict] = end.value
            return verdicts

    def _answers(self, question: Question, asked: list[Conversation]) -> Answers:
        if question.guard is not None:
            return self.guards[question.guard].opinions(asked)
        if isinstance(self.teacher, Teacher):
            return self.teacher.judge(asked, self._requested)
        return judge(self.teacher, asked, self.rules.thresholds, self._decode)
