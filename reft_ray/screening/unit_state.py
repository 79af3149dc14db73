"""ScreeningMetrics: the state that each unit leaves behind, and the sum of all of them. No text, numbers only."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from reft_ray.screening.guards import GuardedVerdict
from reft_ray.screening.screener import Outcome, ScreenedRow, ScreenedUnit

BINS = 40
"""Histogram bins over refusal scores in [-1, 1]."""
SHOWN_ROWS = 20
_MAX_GROUPS = 200


@dataclass(slots=True)
class Tally:
    """Counts over rows; tallies add up. `groups` counts outcomes per value of the source column."""

    rows: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    reason_rows: dict[str, list[int]] = field(default_factory=dict)
    decided_by: Counter[str] = field(default_factory=Counter)
    encodings: Counter[str] = field(default_factory=Counter)
    groups: dict[str, Counter[str]] = field(default_factory=dict)
    histogram: list[int] = field(default_factory=lambda: [0] * BINS)
    truncated: int = 0

    def note(self, reason: str, row: int) -> None:
        """Count a reason and remember the first rows that had it."""
        self.reasons[reason] += 1
        shown = self.reason_rows.setdefault(reason, [])
        if len(shown) < SHOWN_ROWS:
            shown.append(row)

    def add(self, other: Tally) -> None:
        """Take in the counts of rows that follow these."""
        self.rows += other.rows
        self.truncated += other.truncated
        self.histogram = [a + b for a, b in zip(self.histogram, other.histogram, strict=True)]
        for name in ("outcomes", "reasons", "decided_by", "encodings"):
            getattr(self, name).update(getattr(other, name))
        for reason, rows in other.reason_rows.items():
            self.reason_rows[reason] = (self.reason_rows.get(reason, []) + rows)[:SHOWN_ROWS]
        for group, outcomes in other.groups.items():
            known = group in self.groups or len(self.groups) < _MAX_GROUPS
            self.groups.setdefault(group if known else "(others)", Counter()).update(outcomes)


def tally_of(result: ScreenedUnit, reason_of: Callable[[ScreenedRow, GuardedVerdict], str]) -> Tally:
    """The counts of one unit; `reason_of` names why a withheld row is withheld."""
    tally = Tally(rows=len(result.rows))
    for row in result.rows:
        tally.outcomes[str(row.outcome)] += 1
        if row.group is not None:
            tally.groups.setdefault(row.group, Counter())[str(row.outcome)] += 1
        if row.outcome is Outcome.INVALID:
            for code in dict.fromkeys(fault.code for fault in row.faults):
                tally.note(code, row.number)
        if (verdict := row.verdict) is None:
            continue
        tally.histogram[_bin(verdict.score)] += 1
        tally.truncated += verdict.truncated
        if verdict.encoding:
            tally.encodings[verdict.encoding] += 1
        if row.outcome is not Outcome.KEPT:
            tally.note(reason_of(row, verdict), row.number)
        tally.decided_by[verdict.decided_by] += row.outcome is not Outcome.KEPT
    return tally


def _bin(score: float) -> int:
    """A score that is not a number was blocked, so it stands with the highest ones."""
    return BINS - 1 if math.isnan(score) else min(BINS - 1, max(0, int((score + 1) / 2 * BINS)))


@dataclass(frozen=True, slots=True)
class UnitState:
    """What a finished unit leaves in `.screen/units`: enough for the report, the resume and the trainer.

    `kept` are the numbers of its kept rows as [first, last] runs, `parts` its files with their sizes, `signals` what
    the findings need.
    """

    unit: str
    file: int
    judges: Mapping[str, Any]
    tally: Tally
    kept: list[tuple[int, int]]
    parts: Mapping[str, int]
    signals: Mapping[str, Any]

    def to_json(self) -> bytes:
        """The state as stored."""
        return orjson.dumps(self, option=orjson.OPT_SORT_KEYS)

    @classmethod
    def from_json(cls, content: bytes) -> UnitState:
        """The state as `to_json` wrote it."""
        values = orjson.loads(content)
        tally = values.pop("tally")
        for name in ("outcomes", "reasons", "decided_by", "encodings"):
            tally[name] = Counter(tally[name])
        tally["groups"] = {group: Counter(outcomes) for group, outcomes in tally["groups"].items()}
        return cls(tally=Tally(**tally), **values)

    def kept_numbers(self) -> list[int]:
        """Numbers of the kept rows, in order."""
        return [number for first, last in self.kept for number in range(first, last + 1)]


def runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Increasing numbers as [first, last] runs."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found
