"""The report of a screening: counts, reasons with row numbers, findings and the status of the dataset; no text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson

from reft_ray.core.errors import ReftError
from reft_ray.screening.config import Policy, ScreenConfig
from reft_ray.screening.dataset_threshold import DatasetThreshold
from reft_ray.screening.file_parsing import FileShape
from reft_ray.screening.findings import Finding, Severity, Totals, findings_of
from reft_ray.screening.outputs import Output
from reft_ray.screening.policy import Counts, Status, dataset_status
from reft_ray.screening.reading import FilePlan
from reft_ray.screening.screener import Outcome
from reft_ray.screening.unit_state import Tally, UnitState

REPORT = "report.json"


class RowsLostError(ReftError):
    """The number of screened rows differs from that of the input, by `rows`."""

    def __init__(self, message: str, rows: int = 0) -> None:
        super().__init__(message)
        self.rows = rows


@dataclass(frozen=True, slots=True)
class FileCounts:
    """Outcomes of one input file."""

    name: str
    container: str
    format: str
    rows: int
    kept: int
    review: int
    blocked: int
    invalid: int
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reason:
    """Why `count` rows were not kept, with the first row numbers."""

    code: str
    count: int
    first_rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ScreenReport:
    """The content of `report.json`; equal input, teacher and configuration give an equal report.

    `histogram` counts refusal scores in equal bins over [-1, 1]; `decided_by` counts withheld rows by the model that
    decided; `encodings` counts rows whose highest score was in a decoded text; `truncated` counts rows that were too
    long to be read in full. `job_threshold` is the dataset's own threshold; None where it was switched off.
    """

    rows: int
    kept: int
    review: int
    blocked: int
    invalid: int
    status: Status
    status_reason: str
    policy: Policy
    max_reject_ratio: float | None
    judges: Mapping[str, Any]
    files: tuple[FileCounts, ...]
    reasons: tuple[Reason, ...]
    decided_by: Mapping[str, int]
    encodings: Mapping[str, int]
    groups: Mapping[str, Mapping[str, int]]
    histogram: tuple[int, ...]
    truncated: int
    findings: tuple[Finding, ...]
    job_threshold: DatasetThreshold | None = None

    @property
    def counts(self) -> Counts:
        """Rows by outcome."""
        return Counts(self.kept, self.review, self.blocked, self.invalid)

    def to_dict(self) -> dict[str, Any]:
        """The report as a dictionary."""
        return dict(orjson.loads(orjson.dumps(self)))

    def to_json(self) -> bytes:
        """The report as stored in `report.json`."""
        return orjson.dumps(self, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def load_report(out: str) -> ScreenReport:
    """The report of a finished screening. Raises ReftError when there is none."""
    output = Output(out)
    try:
        values = orjson.loads(output.read(REPORT))
    except FileNotFoundError:
        raise ReftError(
            f"{output.name}: no finished screening here ({REPORT} is missing); run it again to finish"
        ) from None
    values["status"] = Status(values["status"])
    values["policy"] = Policy(values["policy"])
    values["files"] = tuple(FileCounts(**file | {"warnings": tuple(file["warnings"])}) for file in values["files"])
    values["reasons"] = tuple(Reason(r["code"], r["count"], tuple(r["first_rows"])) for r in values["reasons"])
    values["findings"] = tuple(
        Finding(**found | {"rows": tuple(found["rows"]), "severity": Severity(found["severity"])})
        for found in values["findings"]
    )
    values["histogram"] = tuple(values["histogram"])
    if values.get("job_threshold") is not None:
        values["job_threshold"] = DatasetThreshold.of(values["job_threshold"])
    return ScreenReport(**values)


def compose(
    states: Iterable[UnitState],
    plans: Sequence[FilePlan],
    shapes: Sequence[FileShape],
    config: ScreenConfig,
    reviewed: tuple[int, int] = (0, 0),
    judges: Mapping[str, Any] | None = None,
    threshold: DatasetThreshold | None = None,
) -> ScreenReport:
    """The report over all units, given in row order; `reviewed` counts the rows that people approved and rejected.

    Raises ReftError for units that were judged by different teachers or thresholds (or by others than `judges`, if
    given), and RowsLostError for a wrong number of rows.
    """
    total, signals = Tally(), Totals()
    per_file = [Tally() for _ in plans]
    for state in states:
        if judges is not None and state.judges != judges:
            raise ReftError(
                "units of this output were judged by different teachers or thresholds; screen into a new directory"
            )
        judges = state.judges
        total.add(state.tally)
        per_file[state.file].add(state.tally)
        signals.add(state.signals)
    counts = _counts(total)
    if counts.rows != total.rows:
        raise RowsLostError(
            f"rows are not conserved: {total.rows} went in and {counts.rows} came out", abs(total.rows - counts.rows)
        )
    status = dataset_status(counts, config.policy, config.max_reject_ratio, *reviewed)
    return ScreenReport(
        rows=total.rows,
        **counts._asdict(),
        status=status.status,
        status_reason=status.reason,
        policy=config.policy,
        max_reject_ratio=config.max_reject_ratio,
        judges=judges or {},
        files=tuple(
            FileCounts(
                shape.name,
                str(shape.container) + (f" ({shape.compression})" if shape.compression else ""),
                str(shape.format),
                tally.rows,
                **_counts(tally)._asdict(),
                warnings=plan.cuts.warnings,
            )
            for shape, plan, tally in zip(shapes, plans, per_file, strict=True)
        ),
        reasons=tuple(
            Reason(code, count, tuple(total.reason_rows[code])) for code, count in total.reasons.most_common()
        ),
        decided_by={name: count for name, count in sorted(total.decided_by.items()) if count},
        encodings=dict(sorted(total.encodings.items())),
        groups={name: dict(sorted(outcomes.items())) for name, outcomes in sorted(total.groups.items())},
        histogram=tuple(total.histogram),
        truncated=total.truncated,
        findings=tuple(findings_of(signals, config.findings_off)),
        job_threshold=threshold and replace(threshold, rows=total.reasons["job_threshold"]),
    )


def _counts(tally: Tally) -> Counts:
    return Counts(*(tally.outcomes[str(outcome)] for outcome in Outcome))
