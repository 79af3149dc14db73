"""The screener: units of rows in, an outcome for each row out; a plain class, used in a loop and in Ray actors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from reft_ray.core.cache import CachedScorer
from reft_ray.core.conversation import Conversation
from reft_ray.core.scoring import Scorer
from reft_ray.core.verdict import Decision
from reft_ray.rows.checks import Fault
from reft_ray.rows.format import Row
from reft_ray.rows.reader import ChatRow, RowReader
from reft_ray.screening.config import ScorerFactory, ScreenConfig
from reft_ray.screening.file_parsing import FileShape, parse_unit
from reft_ray.screening.guards import GuardedVerdict, GuardEnsemble
from reft_ray.screening.reading import Unit


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

    An invalid row has only `faults`. Of a valid one, `conversation` is what training reads, `judged` what the guards
    judged (see `rows.format.judged_text`), `group` the value of the column to report by.
    """

    number: int
    outcome: Outcome
    faults: tuple[Fault, ...] = ()
    conversation: Conversation = ()
    judged: Conversation = ()
    verdict: GuardedVerdict | None = None
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
        self.guards = GuardEnsemble(
            CachedScorer(teacher, config.cache_texts) if isinstance(teacher, Scorer) else teacher,
            config.guard() if config.guard else None,
            config.guard_combine,
            config.guard_order,
            config.thresholds,
            config.decode,
        )
        self._config = config
        self._shapes = {shape.index: shape for shape in shapes}
        self._readers: dict[int, RowReader] = {}

    @property
    def judges(self) -> dict[str, Any]:
        """The teacher, the guard and their thresholds: equal in all units of one screening."""
        guards = self.guards
        # Only with a guard, so that screenings of earlier releases resume.
        threshold = {"guard_threshold": guards.guard.threshold} if guards.guard else {}
        return {
            **threshold,
            "teacher": guards.teacher.teacher_id,
            "guard": guards.guard.guard_id if guards.guard else None,
            "combine": str(guards.combine) if guards.guard else None,
            "order": str(guards.order) if guards.guard else None,
            "thresholds": {"review": guards.thresholds.review, "block": guards.thresholds.block},
        }

    def screen(self, unit: Unit) -> ScreenedUnit:
        """The outcome of every row of a unit."""
        shape = self._shapes[unit.file]
        parsed = parse_unit(unit, shape.container, shape.header)
        numbers = unit.rows["row_number"].to_pylist()
        raws = unit.rows["raw"].to_pylist()
        reader = self._readers.setdefault(shape.index, self._reader(shape))
        rows: list[ScreenedRow | None] = [None] * len(parsed)
        valid: list[tuple[int, ChatRow]] = []
        for index, row in enumerate(parsed):
            found = [row] if isinstance(row, Fault) else reader.read(row, raws[index])
            if isinstance(found, list):
                rows[index] = ScreenedRow(numbers[index], Outcome.INVALID, tuple(found))
            else:
                valid.append((index, found))
        for start in range(0, len(valid), self._config.batch_rows):
            batch = valid[start : start + self._config.batch_rows]
            verdicts = self.guards.judge([chat_row.judged for _, chat_row in batch])
            for (index, chat_row), verdict in zip(batch, verdicts, strict=True):
                rows[index] = ScreenedRow(
                    numbers[index],
                    OUTCOMES[verdict.decision],
                    conversation=chat_row.conversation,
                    judged=chat_row.judged,
                    verdict=verdict,
                    group=self._group(chat_row.fields),
                )
        return ScreenedUnit(unit, shape, [row for row in rows if row is not None])

    def _reader(self, shape: FileShape) -> RowReader:
        return RowReader(shape.format, self._config.columns, self._config.control_tokens)

    def _group(self, row: Row) -> str | None:
        if self._config.source_column is None:
            return None
        value = row.get(self._config.source_column)
        return value[:64] if isinstance(value, str) else "(none)"
