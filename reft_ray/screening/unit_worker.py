"""The work on one unit: judge its rows, write its parts, then its state; in one pass or in two.

Where the dataset may get its own threshold, the first pass stores verdicts, and the second writes the parts from them
without a teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from reft_ray.core.errors import ReftError
from reft_ray.screening.config import ScorerFactory, ScreenConfig
from reft_ray.screening.dataset_threshold import DatasetThreshold
from reft_ray.screening.file_parsing import FileShape
from reft_ray.screening.metrics import ScreeningMetrics
from reft_ray.screening.outputs import UNITS, Output, reason_of, write_parts
from reft_ray.screening.reading import Unit
from reft_ray.screening.screener import Outcome, ScreenedUnit, Screener, UnitParser
from reft_ray.screening.signals import Inspector
from reft_ray.screening.stored_verdicts import JudgedUnit, read_judged, write_judged
from reft_ray.screening.unit_state import UnitState, runs, tally_of
from reft_ray.telemetry.metric_types import DEFAULT_APPLICATION

DECODED_TEXTS = 8_192


class Pass(StrEnum):
    """What a worker does with a unit: everything, only judge it, or write the parts of one that was judged."""

    WHOLE = "whole"
    JUDGE = "judge"
    WRITE = "write"


@dataclass(frozen=True, slots=True)
class Job:
    """The input of a worker.

    `sample` is the share of rows for the expensive findings, `score_sample` that of the scores from which the dataset's
    `threshold` is derived.

    A worker in another process records metrics for `project` itself, with the label `application`.
    """

    scorer_factory: ScorerFactory
    config: ScreenConfig
    shapes: Sequence[FileShape]
    out: str
    sample: float = 1.0
    score_sample: float = 1.0
    project: str = "default"
    application: str = DEFAULT_APPLICATION
    step: Pass = Pass.WHOLE
    threshold: DatasetThreshold | None = None


class Finished(NamedTuple):
    """A unit whose files are written."""

    unit: str
    rows: int


def judges_of(job: Job) -> dict[str, Any]:
    """The judges of the job, loaded in this process."""
    return Screener(job.scorer_factory, job.config, job.shapes).judges


class UnitWorker(Protocol):
    """Works on units, one at a time."""

    def work(self, unit: Unit) -> Finished:
        """Do the work on a unit; idempotent."""
        ...


def worker_of(job: Job, metrics: ScreeningMetrics | None = None) -> UnitWorker:
    """The worker of a job's pass, with its scorer where it judges."""
    return PartWriter(job, metrics) if job.step is Pass.WRITE else UnitJudge(job, metrics)


class UnitJudge:
    """Screens units with one scorer, into parts or, in the first of two passes, into stored verdicts."""

    def __init__(self, job: Job, metrics: ScreeningMetrics | None = None) -> None:
        # Judging and the findings need the same readings: decode a unit's texts once.
        self._decode = lru_cache(maxsize=DECODED_TEXTS)(job.config.decode)
        self._screener = Screener(job.scorer_factory, replace(job.config, decode=self._decode), job.shapes)
        self._inspector = Inspector(job.config.languages, self._decode, job.sample) if job.config.findings else None
        self._job, self._output, self._metrics = job, Output(job.out), metrics

    def work(self, unit: Unit) -> Finished:
        """Screen a unit; idempotent."""
        result = self._screener.screen(unit)
        signals = self._inspector.inspect(result.rows) if self._inspector else {}
        # The cache holds whole texts: clear it after each unit.
        self._decode.cache_clear()
        judged = JudgedUnit.of(result, self._screener.judges, signals)
        if self._job.step is Pass.JUDGE:
            write_judged(self._output, judged, self._job.score_sample)
        else:
            finish(self._output, result, judged)
            if self._metrics is not None:
                self._metrics.unit(result, self._job.config, judged.judges["teacher"])
        return Finished(unit.id, len(result.rows))


class PartWriter:
    """Writes the parts of judged units under the dataset's threshold; it needs no scorer."""

    def __init__(self, job: Job, metrics: ScreeningMetrics | None = None) -> None:
        if job.threshold is None:
            raise ValueError("the threshold of the dataset is not known")
        self._config, self._threshold, self._metrics = job.config, job.threshold, metrics
        self._parser = UnitParser(job.config, job.shapes)
        self._output = Output(job.out)

    def work(self, unit: Unit) -> Finished:
        """Write the parts and the state of a unit; idempotent."""
        judged = read_judged(self._output, unit.id)
        parsed = self._parser.parse(unit, checked=frozenset(judged.numbers))
        if [row.number for row in parsed.valid] != judged.numbers:
            raise ReftError(f"unit {unit.id}: the input changed after it was judged; screen into a new directory")
        result = parsed.screened([self._threshold.apply(verdict) for verdict in judged.verdicts])
        finish(self._output, result, judged)
        if self._metrics is not None:
            self._metrics.unit(result, self._config, judged.judges["teacher"])
        return Finished(unit.id, len(result.rows))


def finish(output: Output, result: ScreenedUnit, judged: JudgedUnit) -> None:
    """Write the parts of a unit, then its state."""
    state = UnitState(
        unit=result.unit.id,
        file=result.unit.file,
        judges=judged.judges,
        tally=tally_of(result, reason_of),
        kept=runs(row.number for row in result.rows if row.outcome is Outcome.KEPT),
        parts=write_parts(output, result),
        signals=judged.signals,
    )
    output.write(f"{UNITS}/{result.unit.id}.json", state.to_json())
