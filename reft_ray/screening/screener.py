"""The screener: units of rows in, an outcome for each row out; a plain class, used in a loop and in Ray actors."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from reft_ray.core.cache import CachedScorer
from reft_ray.core.cascade import GuardedVerdict
from reft_ray.core.conversation import Conversation
from reft_ray.core.scoring import Scorer
from reft_ray.core.verdict import Decision
from reft_ray.rows.checks import Fault
from reft_ray.rows.format import Row
from reft_ray.rows.reader import ChatRow, RowReader
from reft_ray.screening.config import ScorerFactory, ScreenConfig
from reft_ray.screening.file_parsing import FileShape, validated_rows
from reft_ray.screening.guards import GuardEnsemble
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

    An invalid row has only `faults`. Of a valid one, `row` gives what training reads and what the guards judged, and
    `group` is the value of the column to report by.
    """

    number: int
    outcome: Outcome
    faults: tuple[Fault, ...] = ()
    row: ChatRow | None = None
    verdict: GuardedVerdict | None = None
    group: str | None = None

    @property
    def conversation(self) -> Conversation:
        """What training reads."""
        return self.row.conversation if self.row else ()

    @property
    def judged(self) -> Conversation:
        """What the guards judged (see `rows.layout.judged_text`)."""
        return self.row.judged if self.row else ()


@dataclass(frozen=True, slots=True)
class ScreenedUnit:
    """A unit with one ScreenedRow for each of its rows, in order."""

    unit: Unit
    shape: FileShape
    rows: Sequence[ScreenedRow]


class ValidRow(NamedTuple):
    """A row that can be judged; the fields are those of ScreenedRow."""

    number: int
    row: ChatRow
    group: str | None


@dataclass(frozen=True, slots=True)
class ParsedUnit:
    """A unit with its rows in order, those that are invalid with their faults."""

    unit: Unit
    shape: FileShape
    rows: Sequence[ScreenedRow | ValidRow]

    @property
    def valid(self) -> list[ValidRow]:
        """The rows that can be judged."""
        return [row for row in self.rows if isinstance(row, ValidRow)]

    def screened(self, verdicts: Sequence[GuardedVerdict]) -> ScreenedUnit:
        """The unit with one verdict for each valid row, in order."""
        made = iter(
            ScreenedRow(
                row.number,
                OUTCOMES[verdict.decision],
                row=row.row,
                verdict=verdict,
                group=row.group,
            )
            for row, verdict in zip(self.valid, verdicts, strict=True)
        )
        rows = [next(made) if isinstance(row, ValidRow) else row for row in self.rows]
        return ScreenedUnit(self.unit, self.shape, rows)


class UnitParser:
    """Parses and validates the rows of units."""

    def __init__(self, config: ScreenConfig, shapes: Sequence[FileShape]) -> None:
        self._config = config
        self._shapes = {shape.index: shape for shape in shapes}
        self._readers = {
            shape.index: RowReader(shape.format, config.columns, config.control_tokens, speakers=config.speakers)
            for shape in shapes
        }
        self._check = config.row_check() if config.row_check else None

    def parse(self, unit: Unit, checked: Container[int] = ()) -> ParsedUnit:
        """The rows of a unit; those with a number in `checked` passed the row check before."""
        shape = self._shapes[unit.file]
        rows: list[ScreenedRow | ValidRow] = []
        for number, _, found in validated_rows(unit, shape, self._readers[unit.file]):
            if self._check and isinstance(found, ChatRow) and number not in checked:
                found = [fault] if (fault := self._check(found.conversation)) else found
            if isinstance(found, list):
                rows.append(ScreenedRow(number, Outcome.INVALID, tuple(found)))
            else:
                rows.append(ValidRow(number, found, self._group(found.fields)))
        return ParsedUnit(unit, shape, rows)

    def _group(self, row: Row) -> str | None:
        if self._config.source_column is None:
            return None
        value = row.get(self._config.source_column)
        return value[:64] if isinstance(value, str) else "(none)"


class Screener:
    """Parses, validates and judges the rows of units."""

    def __init__(self, scorer_factory: ScorerFactory, config: ScreenConfig, shapes: Sequence[FileShape]) -> None:
        teacher = scorer_factory()
        self.guards = GuardEnsemble(
            CachedScorer(teacher, config.cache_texts) if isinstance(teacher, Scorer) else teacher,
            config.guards() if config.guards else (),
            config.guard_combine,
            config.guard_order,
            config.thresholds,
            config.decode,
        )
        self._batch_rows = config.batch_rows
        self._parser = UnitParser(config, shapes)

    @property
    def judges(self) -> dict[str, Any]:
        """The teacher, the guards, their thresholds and the policy's version: equal in all units of one screening."""
        rules = self.guards.rules
        return rules.judges | {"policy": rules.version}

    def screen(self, unit: Unit) -> ScreenedUnit:
        """The outcome of every row of a unit."""
        parsed = self._parser.parse(unit)
        texts = [row.row.judged for row in parsed.valid]
        starts = range(0, len(texts), self._batch_rows)
        batches = (self.guards.judge(texts[start : start + self._batch_rows]) for start in starts)
        return parsed.screened([verdict for batch in batches for verdict in batch])
