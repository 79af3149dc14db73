"""The stored state of a finished unit: outcome counts and kept row numbers, without text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from reft_ray.core.cascade import GuardedVerdict
from reft_ray.screening.screener import Outcome, ScreenedRow, ScreenedUnit

BINS = 40
"""Histogram bins over refusal scores in [-1, 1]."""
SHOWN_ROWS = 20
_MAX_GROUPS = 200


@dataclass(slots=True)
class Tally:
    """Counts over rows. `groups` counts outcomes per value of the source column."""

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
        """Count a reason and keep the first row numbers."""
        self.reasons[reason] += 1
        shown = self.reason_rows.setdefault(reason, [])
        if len(shown) < SHOWN_ROWS:
            shown.append(row)

    def add(self, other: Tally) -> None:
        """Add the counts of the rows that follow."""
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
    """The counts of one unit; `reason_of` gives the code for a withheld row."""
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
    """The histogram bin of a score."""
    return min(BINS - 1, max(0, int((score + 1) / 2 * BINS)))


@dataclass(frozen=True, slots=True)
class UnitState:
    """The content of `.screen/units/<unit>.json`, for the report, for resuming and for training.

    `kept` are the numbers of the kept rows as [first, last] runs, `parts` the files with their sizes, `signals` those
    for the findings.
    """

    unit: str
    file: int
    judges: Mapping[str, Any]
    tally: Tally
    kept: list[tuple[int, int]]
    parts: Mapping[str, int]
    signals: Mapping[str, Any]

    def to_json(self) -> bytes:
        """Serialize for storage."""
        return orjson.dumps(self, option=orjson.OPT_SORT_KEYS)

    @classmethod
    def from_json(cls, content: bytes) -> UnitState:
        """Parse what `to_json` wrote."""
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
