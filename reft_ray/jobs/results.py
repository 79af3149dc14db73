"""The results of a job's steps: small records of numbers and ids, stored as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

REJECTED_SECONDS = 30 * 86400
"""How long rejected rows are kept for review and appeal: the quarantine file's `expires_after`."""


@dataclass(frozen=True, slots=True)
class Validation:
    """The check of the training and validation files; `first_lines` are the first invalid ones, `first_fault` says what
    is wrong with the first."""

    rows: int
    tokens: int
    errors: int = 0
    first_lines: tuple[int, ...] = ()
    first_code: str | None = None
    report_file: str | None = None
    first_fault: str | None = None


@dataclass(frozen=True, slots=True)
class Screening:
    """The verdicts on all rows: `rows` = `kept` + `review` + `blocked` + `invalid`.

    `first_lines` are the first rows that are not kept. `report_file` has a line per such row, without its text;
    `quarantine_file` has the rows and is deleted with the training file. Training reads `kept_uri`.
    """

    rows: int
    kept: int
    review: int
    blocked: int
    kept_uri: str
    invalid: int = 0
    first_lines: tuple[int, ...] = ()
    report_file: str | None = None
    quarantine_file: str | None = None
    teacher_id: str = ""
    kept_sha256: str = ""

    @property
    def withheld(self) -> int:
        """Rows that the teacher blocks or withholds for review."""
        return self.review + self.blocked

    @property
    def lost_rows(self) -> int:
        """The difference between input rows and counted rows: 0 unless there is a defect."""
        return abs(self.rows - self.kept - self.withheld - self.invalid)

    @property
    def reject_ratio(self) -> float:
        """The share of withheld rows among the valid ones."""
        valid = self.rows - self.invalid
        return self.withheld / valid if valid else 0.0


@dataclass(frozen=True, slots=True)
class Training:
    """The trained student. `result_file` is the CSV of its losses, `kept_file` has the rows, if not all were kept."""

    adapter_uri: str
    steps: int
    trained_tokens: int
    result_file: str | None = None
    kept_file: str | None = None


@dataclass(frozen=True, slots=True)
class GateCheck:
    """One limit of the release gate with its measurements, as in `evaluation.gate.Check`.

    `bound` is the kind of limit (`at_most`, `at_least`, `rise_at_most`, `drop_at_most`); `base` is the model before
    finetuning. None: not measured.
    """

    measure: str
    bound: str
    limit: float
    student: float | None
    base: float | None
    passed: bool

    @property
    def holds(self) -> bool:
        """Whether the limit is met; a missing measurement does not meet it."""
        return self.passed and self.student is not None and math.isfinite(self.student)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The student's checks against the stricter of the operator's and the user's limits."""

    checks: tuple[GateCheck, ...]
    report_file: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the student may be released; not without any check."""
        return bool(self.checks) and all(check.holds for check in self.checks)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Evaluation:
        """Read what `record_of` wrote."""
        return cls(tuple(GateCheck(**check) for check in document["checks"]), document["report_file"])


@dataclass(frozen=True, slots=True)
class Export:
    """The student as a PEFT directory with model card and provenance; `archive_file` is its zip."""

    uri: str
    archive_file: str | None = None


def record_of(result: Any) -> dict[str, Any]:
    """A step's result as JSON, with null for NaN."""
    document: dict[str, Any] = finite(asdict(result))
    return document


def finite(value: Any) -> Any:
    """The value as JSON can represent it: tuples as lists, NaN and infinities as None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def result_of(kind: type[Any], document: dict[str, Any]) -> Any:
    """Read the result that `record_of` wrote."""
    if kind is Evaluation:
        return Evaluation.from_json(document)
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in document.items()})
