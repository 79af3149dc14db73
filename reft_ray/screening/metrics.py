"""Metrics of a screening: units as they finish, and the dataset at its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from reft_ray.screening.config import ScreenConfig
from reft_ray.screening.report import ScreenReport
from reft_ray.screening.screener import ScreenedUnit
from reft_ray.telemetry import catalog
from reft_ray.telemetry.drift import DRIFT_ROWS, ScoreHistogram, record_drift
from reft_ray.telemetry.recorder import NullRecorder, Recorder
from reft_ray.telemetry.verdict_metrics import record_verdicts

SMALL_ROWS = 100_000
"""Datasets of up to this many rows have the objective of ten minutes."""
_STREAM = "dataset"
_OUTCOMES = {"passed": "passed", "needs_review": "review", "refused": "refused"}


@dataclass(frozen=True, slots=True)
class ScreeningMetrics:
    """Counts for one `project`. A resumed run does not count the units of earlier runs again.

    `calibration` counts the teacher's validation scores in equal bins over [-1, 1]; without it no drift is recorded.
    """

    recorder: Recorder = field(default_factory=NullRecorder)
    project: str = "default"
    calibration: Sequence[int] = ()

    def unit(self, result: ScreenedUnit, config: ScreenConfig, teacher: str) -> None:
        """Count one unit's rows by outcome, its verdicts and its invalid rows."""
        for outcome, rows in Counter(row.outcome for row in result.rows).items():
            self.recorder.count(catalog.SCREENING_ROWS, rows, outcome=str(outcome), project=self.project)
        native = result.unit.native
        content = native.nbytes if native is not None else result.unit.rows["raw"].nbytes
        self.recorder.count(catalog.SCREENING_BYTES, content, project=self.project)
        verdicts = [row.verdict for row in result.rows if row.verdict is not None]
        record_verdicts(
            self.recorder,
            [verdict.decision for verdict in verdicts],
            [verdict.reason for verdict in verdicts],
            [verdict.score for verdict in verdicts],
            stream=_STREAM,
            policy=str(config.policy),
            teacher=teacher,
        )
        truncated = sum(verdict.truncated for verdict in verdicts)
        self.recorder.count(catalog.FILTER_TRUNCATIONS, truncated, stream=_STREAM)
        codes = Counter(code for row in result.rows for code in dict.fromkeys(fault.code for fault in row.faults))
        for code, rows in codes.items():
            self.recorder.count(catalog.SCREENING_INVALID, rows, code=code)

    def ended(self, report: ScreenReport, seconds: float) -> None:
        """Count a finished dataset."""
        outcome = _OUTCOMES[str(report.status)]
        self.recorder.count(catalog.SCREENING_DATASETS, policy=str(report.policy), outcome=outcome)
        size = "small" if report.rows <= SMALL_ROWS else "large"
        self.recorder.observe(catalog.SCREENING_SECONDS, seconds, size=size)
        for finding in report.findings:
            self.recorder.count(catalog.SCREENING_FINDINGS, finding=finding.name, severity=str(finding.severity))
        scores = ScoreHistogram.of_cosines(report.histogram)
        if scores.rows >= DRIFT_ROWS and any(self.calibration):
            calibration = ScoreHistogram.of_cosines(self.calibration)
            record_drift(self.recorder, calibration, scores, stream=_STREAM, teacher=report.judges["teacher"])

    def failed(self, config: ScreenConfig, lost: int = 0) -> None:
        """Count a screening that failed; `lost` rows went in and did not come out."""
        self.recorder.count(catalog.SCREENING_DATASETS, policy=str(config.policy), outcome="failed")
        self.recorder.count(catalog.UNACCOUNTED_ROWS, lost, where="screening")
