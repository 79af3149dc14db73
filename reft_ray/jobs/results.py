"""What the steps of a job return: small records of numbers and ids, stored as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

REJECTED_SECONDS = 30 * 86400
"""How long rejected rows are kept for review and appeal: `expires_after` of the quarantine file."""


@dataclass(frozen=True, slots=True)
class Validation:
    """The training (and validation) file was read. `first_lines` names the first bad ones, `report_file` all."""

    rows: int
    tokens: int
    errors: int = 0
    first_lines: tuple[int, ...] = ()
    first_code: str | None = None
    report_file: str | None = None


@dataclass(frozen=True, slots=True)
class Screening:
    """Every row was judged: `rows` = `kept` + `review` + `blocked` + `invalid`.

    `first_lines` names the first rows that were not kept. `report_file` has a line per such row, without its text;
    `quarantine_file` has the rows themselves and goes with the training file. `kept_uri` is what training reads.
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
        """Rows that the teacher holds back."""
        return self.review + self.blocked

    @property
    def lost_rows(self) -> int:
        """Rows that went in and did not come out, or came out of nowhere: 0 unless there is a defect."""
        return abs(self.rows - self.kept - self.withheld - self.invalid)

    @property
    def reject_ratio(self) -> float:
        """The share of the valid rows that is held back."""
        valid = self.rows - self.invalid
        return self.withheld / valid if valid else 0.0


@dataclass(frozen=True, slots=True)
class Training:
    """The student was trained. `adapter_uri` is its adapter, `result_file` the CSV of its losses."""

    adapter_uri: str
    steps: int
    trained_tokens: int
    result_file: str | None = None


@dataclass(frozen=True, slots=True)
class GateCheck:
    """One limit of the release gate with the numbers behind it, as `evaluation.gate.Check` has them.

    `bound` says how the limit is read (`at_most`, `at_least`, `rise_at_most`, `drop_at_most`); `base` is the model
    before finetuning; None where a number was not taken.
    """

    measure: str
    bound: str
    limit: float
    student: float | None
    base: float | None
    passed: bool

    @property
    def holds(self) -> bool:
        """Whether the limit was met, by a number: what was not measured does not hold."""
        return self.passed and self.student is not None and math.isfinite(self.student)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The student was measured against the operator's limits (and the user's own, where they are tighter)."""

    checks: tuple[GateCheck, ...]
    report_file: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the student may be released; without any check it may not."""
        return bool(self.checks) and all(check.holds for check in self.checks)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Evaluation:
        """What `record_of` wrote."""
        return cls(tuple(GateCheck(**check) for check in document["checks"]), document["report_file"])


@dataclass(frozen=True, slots=True)
class Export:
    """The student was packed as a PEFT directory with card and provenance; `archive_file` is the same as a zip."""

    uri: str
    archive_file: str | None = None


def record_of(result: Any) -> dict[str, Any]:
    """A step's result as JSON, which has no NaN: null stands for it."""
    document: dict[str, Any] = finite(asdict(result))
    return document


def finite(value: Any) -> Any:
    """The same value as JSON can hold it: tuples as lists, numbers that are none as None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def result_of(kind: type[Any], document: dict[str, Any]) -> Any:
    """The result that `record_of` wrote."""
    if kind is Evaluation:
        return Evaluation.from_json(document)
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in document.items()})
