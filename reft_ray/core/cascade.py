"""The Ref-Teacher and any number of guards on the same rows: who is asked about which row, and what follows.

`cascade` holds the rules and calls no model itself: it yields questions and is sent the answers. So a loop over local
models (`screening.guards`) and the online filter (`api.guarded`) follow the same rules.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Any, NamedTuple, Protocol, runtime_checkable

from reft_ray.core.conversation import Conversation
from reft_ray.core.errors import ReftError, UsageError
from reft_ray.core.verdict import Decision, Thresholds, Verdict


@dataclass(frozen=True, slots=True)
class Opinion:
    """A guard on one row: the probability in [0, 1] that it is harmful, and why.

    `categories` are OpenAI's where the guard's own have a counterpart, otherwise the guard's own; `hazards` are
    MLCommons' codes (`core.hazards`). `part` names the part that was flagged, where the guard knows.
    """

    probability: float
    categories: tuple[str, ...] = ()
    hazards: tuple[str, ...] = ()
    part: str = ""


@runtime_checkable
class Guard(Protocol):
    """A second model that judges rows; a probability of `threshold` and above is flagged."""

    @property
    def guard_id(self) -> str:
        """Identifier of the guard in reports."""
        ...

    @property
    def threshold(self) -> float:
        """The lowest probability that is flagged."""
        ...

    def opinions(self, conversations: Sequence[Conversation]) -> list[Opinion]:
        """One Opinion per conversation, in order. An error stops the run: no row passes unjudged."""
        ...


class GuardInfo(NamedTuple):
    """What the rules need to know of a guard."""

    guard_id: str
    threshold: float


class Combine(StrEnum):
    """How the verdicts of the teacher and the guards are combined.

    `ANY`: blocked when any of them blocks. `ALL`: withheld only where all of them flag the row. `MAJORITY`: blocked
    when more than half flag it, and to be reviewed by a person when exactly half do. `GREY_BAND`: the guards decide
    only about rows that the teacher sends to review; one that flags blocks.
    """

    ANY = "any"
    ALL = "all"
    MAJORITY = "majority"
    GREY_BAND = "grey-band"


class Order(StrEnum):
    """Whether the guards judge rows after the teacher or before it; who comes later skips rows that are decided."""

    AFTER = "after"
    BEFORE = "before"


@dataclass(frozen=True, slots=True)
class GuardedVerdict(Verdict):
    """A verdict with the models that made it: `decided_by` has the ids of the teacher and the guards that decided,
    joined by `+`. `guard_score` is the highest probability of a guard, None where none was asked. `policy` is the
    version of the policy (`policy_version`). `offset` is what the thresholds were raised by for an answer;
    `by_job_threshold` marks a row that only the dataset's own threshold withholds."""

    teacher: str = ""
    decided_by: str = ""
    guard_score: float | None = None
    offset: float = 0.0
    by_job_threshold: bool = False
    policy: str = ""

    @property
    def prompt_score(self) -> float | None:
        """The score on the scale of prompts; None where the teacher scored no text."""
        return self.score_as_prompt(self.offset)

    @property
    def by_teacher(self) -> bool:
        """Whether the teacher's score decided, alone or together with guards."""
        return self.decided_by.startswith(self.teacher)

    @property
    def reason(self) -> str:
        """The reason, as a label of the telemetry catalogue."""
        if self.decision is Decision.ALLOW:
            return "clear"
        if self.by_job_threshold:
            return "job_threshold"
        return super(GuardedVerdict, self).reason if self.by_teacher else "guard"


@dataclass(frozen=True, slots=True)
class Rules:
    """The teacher's thresholds and the guards, in the order in which they are asked. Raises UsageError."""

    teacher: str
    thresholds: Thresholds
    guards: tuple[GuardInfo, ...] = ()
    combine: Combine = Combine.ANY
    order: Order = Order.AFTER

    def __post_init__(self) -> None:
        if self.combine is Combine.GREY_BAND and self.order is Order.BEFORE:
            raise UsageError("grey-band asks the guards about rows that the teacher sends to review: use order after")
        names = [guard.guard_id for guard in self.guards]
        if len(set(names)) < len(names):
            raise UsageError(f"two guards are called {max(names, key=names.count)}: give them a name each")

    @property
    def judges(self) -> dict[str, Any]:
        """The teacher, the guards and how they decide, as JSON: equal wherever the same policy is applied."""
        found: dict[str, Any] = {
            "teacher": self.teacher,
            "thresholds": {"review": self.thresholds.review, "block": self.thresholds.block},
        }
        if self.guards:
            found["guards"] = [guard._asdict() for guard in self.guards]
            found |= {"combine": str(self.combine), "order": str(self.order)}
        return found

    @property
    def version(self) -> str:
        """`policy-` and 12 hex digits: changes with any model, threshold or rule."""
        return policy_version(self.judges)


def policy_version(judges: Mapping[str, Any]) -> str:
    """The version of the policy that these judges make."""
    return "policy-" + hashlib.sha256(json.dumps(judges, sort_keys=True).encode()).hexdigest()[:12]


class Question(NamedTuple):
    """Ask the teacher (`guard` is None) or the guard of this index about these rows."""

    guard: int | None
    rows: list[int]


Answers = Sequence[Verdict | Opinion]


def cascade(rules: Rules, rows: int) -> Generator[Question, Answers, list[GuardedVerdict]]:
    """Yield questions about `rows` rows, be sent the answers to each, in order, and return one verdict per row.

    Raises ReftError for answers of another number, and for probabilities outside [0, 1].
    """
    states = [_Row() for _ in range(rows)]
    after = rules.order is Order.AFTER
    guards: list[int | None] = list(range(len(rules.guards)))
    for voter in [None, *guards] if after else [*guards, None]:
        asked = [index for index, row in enumerate(states) if not row.settled(rules)]
        if not asked:
            continue
        answers = yield Question(voter, asked)
        if len(answers) != len(asked):
            name = rules.teacher if voter is None else rules.guards[voter].guard_id
            raise ReftError(f"{name}: {len(asked)} rows, {len(answers)} verdicts")
        for index, answer in zip(asked, answers, strict=True):
            if isinstance(answer, Opinion):
                states[index].opinions[_checked(rules, voter, answer)] = answer
            else:
                states[index].verdict = answer
    version = rules.version
    return [row.result(rules, version) for row in states]


def _checked(rules: Rules, guard: int | None, opinion: Opinion) -> int:
    if guard is None or not math.isfinite(opinion.probability) or not 0.0 <= opinion.probability <= 1.0:
        name = rules.teacher if guard is None else rules.guards[guard].guard_id
        raise ReftError(f"guard {name}: expected probabilities in [0, 1]")
    return guard


class _Row:
    """What is known of one row so far."""

    def __init__(self) -> None:
        self.verdict: Verdict | None = None
        self.opinions: dict[int, Opinion] = {}

    @property
    def withheld(self) -> bool:
        """Whether the teacher withholds the row."""
        return self.verdict is not None and self.verdict.decision is not Decision.ALLOW

    @property
    def cleared(self) -> bool:
        """Whether the teacher allows the row."""
        return self.verdict is not None and not self.withheld

    def flags(self, rules: Rules) -> list[int]:
        """The guards that flag the row."""
        return [index for index, found in self.opinions.items() if found.probability >= rules.guards[index].threshold]

    def votes(self, rules: Rules) -> tuple[int, int]:
        """(votes for harm, votes against it) so far."""
        flags = len(self.flags(rules))
        return flags + self.withheld, len(self.opinions) - flags + self.cleared

    def settled(self, rules: Rules) -> bool:
        """Whether no further answer can change the decision."""
        decision = self.verdict and self.verdict.decision
        yes, no = self.votes(rules)
        match rules.combine:
            case Combine.ANY:
                return decision is Decision.BLOCK or bool(self.flags(rules))
            case Combine.ALL:
                return no > 0
            case Combine.MAJORITY:
                return 2 * max(yes, no) > len(rules.guards) + 1
            case Combine.GREY_BAND:
                return decision in (Decision.ALLOW, Decision.BLOCK) or bool(self.flags(rules))

    def result(self, rules: Rules, version: str) -> GuardedVerdict:
        """The row's verdict under the policy of this version."""
        flags = self.flags(rules)
        clears = [index for index in self.opinions if index not in flags]
        decision, teacher, guards = self._decided(rules, flags, clears)
        names = [rules.teacher] if teacher else []
        names += [rules.guards[index].guard_id for index in guards]
        found = [self.opinions[index] for index in flags] if decision is not Decision.ALLOW else []
        verdict = replace(
            self._teachers(rules),
            decision=decision,
            categories=_union(opinion.categories for opinion in found),
            hazards=_union(opinion.hazards for opinion in found),
        )
        values = {field.name: getattr(verdict, field.name) for field in fields(Verdict)}
        return GuardedVerdict(
            **values,
            teacher=rules.teacher,
            decided_by="+".join(names),
            guard_score=max((opinion.probability for opinion in self.opinions.values()), default=None),
            # A teacher over HTTP reports the threshold that it applied, not the offset.
            offset=max(0.0, verdict.threshold - rules.thresholds.block) if verdict.windows else 0.0,
            policy=version,
        )

    def _decided(self, rules: Rules, flags: list[int], clears: list[int]) -> tuple[Decision, bool, list[int]]:
        """(decision, whether the teacher made it, the guards that made it)."""
        teachers = self.verdict.decision if self.verdict else Decision.ALLOW
        match rules.combine:
            case Combine.ALL:
                if not (self.cleared or clears):
                    return teachers, True, flags
                return Decision.ALLOW, self.cleared, clears
            case Combine.MAJORITY:
                yes, no = self.votes(rules)
                if yes >= no:
                    return Decision.BLOCK if yes > no else Decision.REVIEW, self.withheld, flags
                return Decision.ALLOW, self.cleared, clears
            case _:
                if flags:
                    return Decision.BLOCK, False, flags
                if rules.combine is Combine.GREY_BAND and teachers is Decision.REVIEW and clears:
                    return Decision.ALLOW, False, clears
                return teachers, True, []

    def _teachers(self, rules: Rules) -> Verdict:
        """The teacher's verdict; where it was not asked, the guards' probability mapped to [-1, 1]."""
        if self.verdict is not None:
            return self.verdict
        index, top = max(self.opinions.items(), key=lambda item: item[1].probability)
        threshold = 2 * rules.guards[index].threshold - 1
        return Verdict(Decision.ALLOW, 2 * top.probability - 1, top.probability, threshold, part=top.part, windows=0)


def _union(names: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for group in names for name in group))
