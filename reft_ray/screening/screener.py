"""The screener: units of rows in, an outcome for each row out. A plain class, the same in a loop and in an actor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from reft_ray.core.cache import CachedScorer
from reft_ray.core.conversation import Conversation
from reft_ray.core.scoring import Scorer
from reft_ray.core.verdict import Decision
from reft_ray.screening.checks import Fault
from reft_ray.screening.config import ScorerFactory, ScreenConfig
from reft_ray.screening.formats import Row, conversation_of, mapped, screened_of
from reft_ray.screening.guards import Cascade, Ruling
from reft_ray.screening.parsing import FileShape, parse_unit
from reft_ray.screening.reading import Unit
from reft_ray.screening.validation import RowChecker


class Outcome(StrEnum):
    """Where a row goes."""

    KEPT = "kept"
    REVIEW = "review"
    BLOCKED = "blocked"
    INVALID = "invalid"


OUTCOMES = {Decision.ALLOW: Outcome.KEPT, Decision.REVIEW: Outcome.REVIEW, Decision.BLOCK: Outcome.BLOCKED}


@dataclass(frozen=True, slots=True)
class ScreenedRow:
    """One row with its outcome.

    An invalid row has `faults` and nothing else. Of a valid one, `conversation` is what training reads, `screened`
    the text that was judged (see `formats.screened_of`), `group` the value of the column to report by.
    """

    number: int
    outcome: Outcome
    faults: tuple[Fault, ...] = ()
    conversation: Conversation = ()
    screened: Conversation = ()
    ruling: Ruling | None = None
    group: str | None = None


@dataclass(frozen=True, slots=True)
class ScreenedUnit:
    """A unit with one ScreenedRow for each of its rows, in order."""

    unit: Unit
    shape: FileShape
    rows: Sequence[ScreenedRow]


class Screener:
    """Parses, validates and judges the rows of units."""

    def __init__(self, scorer_factory: ScorerFactory, config: ScreenConfig, shapes: Sequence[FileShape]) -> None:
        teacher = scorer_factory()
        self.cascade = Cascade(
            CachedScorer(teacher, config.cache_texts) if isinstance(teacher, Scorer) else teacher,
            config.guard() if config.guard else None,
            config.guard_combine,
            config.guard_order,
            config.thresholds,
            config.decode,
        )
        self._config = config
        self._shapes = {shape.index: shape for shape in shapes}
        self._checkers: dict[int, RowChecker] = {}

    @property
    def judges(self) -> dict[str, Any]:
        """Who judges, and by which thresholds: equal in all units of one screening."""
        cascade = self.cascade
        # Only with a guard, so that screenings of earlier releases go on.
        threshold = {"guard_threshold": cascade.guard.threshold} if cascade.guard else {}
        return {
            **threshold,
            "teacher": cascade.teacher.teacher_id,
            "guard": cascade.guard.guard_id if cascade.guard else None,
            "combine": str(cascade.combine) if cascade.guard else None,
            "order": str(cascade.order) if cascade.guard else None,
            "thresholds": {"review": cascade.thresholds.review, "block": cascade.thresholds.block},
        }

    def screen(self, unit: Unit) -> ScreenedUnit:
        """The outcome of every row of a unit."""
        shape = self._shapes[unit.file]
        parsed = parse_unit(unit, shape.container, shape.header)
        numbers = unit.rows["row_number"].to_pylist()
        raws = unit.rows["raw"].to_pylist()
        checker = self._checker(shape)
        rows: list[ScreenedRow | None] = [None] * len(parsed)
        valid: list[int] = []
        for index, row in enumerate(parsed):
            faults = [row] if isinstance(row, Fault) else checker.faults(row, raws[index])
            if faults:
                rows[index] = ScreenedRow(numbers[index], Outcome.INVALID, tuple(faults))
            else:
                valid.append(index)
        for start in range(0, len(valid), self._config.batch_rows):
            batch = valid[start : start + self._config.batch_rows]
            fields = [mapped(parsed[index], self._config.columns) for index in batch]  # type: ignore[arg-type]
            screened = [screened_of(row, shape.format) for row in fields]
            for index, row, seen, ruling in zip(batch, fields, screened, self.cascade.rule(screened), strict=True):
                rows[index] = ScreenedRow(
                    numbers[index],
                    OUTCOMES[ruling.verdict.decision],
                    conversation=conversation_of(row, shape.format),
                    screened=seen,
                    ruling=ruling,
                    group=self._group(row),
                )
        return ScreenedUnit(unit, shape, [row for row in rows if row is not None])

    def _checker(self, shape: FileShape) -> RowChecker:
        if shape.index not in self._checkers:
            self._checkers[shape.index] = RowChecker(shape.format, self._config.columns, self._config.control_tokens)
        return self._checkers[shape.index]

    def _group(self, row: Mapping[str, Any] | Row) -> str | None:
        if self._config.source_column is None:
            return None
        value = row.get(self._config.source_column)
        return value[:64] if isinstance(value, str) else "(none)"
