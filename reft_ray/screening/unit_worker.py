"""The work on one unit: judge its rows, write its parts, then its state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from reft_ray.screening.config import ScorerFactory, ScreenConfig
from reft_ray.screening.file_parsing import FileShape
from reft_ray.screening.metrics import ScreeningMetrics
from reft_ray.screening.outputs import UNITS, Output, reason_of, write_parts
from reft_ray.screening.reading import Unit
from reft_ray.screening.screener import Outcome, Screener
from reft_ray.screening.signals import Inspector
from reft_ray.screening.unit_state import UnitState, runs, tally_of
from reft_ray.telemetry.metric_types import DEFAULT_APPLICATION

DECODED_TEXTS = 8_192


@dataclass(frozen=True, slots=True)
class Job:
    """The input of a worker. `sample` is the share of rows for the expensive findings.

    A worker in another process records metrics for `project` itself, with the label `application`.
    """

    scorer_factory: ScorerFactory
    config: ScreenConfig
    shapes: Sequence[FileShape]
    out: str
    sample: float = 1.0
    project: str = "default"
    application: str = DEFAULT_APPLICATION


class Finished(NamedTuple):
    """A unit whose files are written."""

    unit: str
    rows: int


def judges_of(job: Job) -> dict[str, Any]:
    """The judges of the job, loaded in this process."""
    return Screener(job.scorer_factory, job.config, job.shapes).judges


class UnitWorker:
    """Screens units into files with one scorer."""

    def __init__(self, job: Job, metrics: ScreeningMetrics | None = None) -> None:
        self._config, self._metrics = job.config, metrics
        # Judging and the findings need the same readings: decode a unit's texts once.
        self._decode = lru_cache(maxsize=DECODED_TEXTS)(job.config.decode)
        self._screener = Screener(job.scorer_factory, replace(job.config, decode=self._decode), job.shapes)
        self._inspector = Inspector(job.config.languages, self._decode, job.sample) if job.config.findings else None
        self._output = Output(job.out)

    def work(self, unit: Unit) -> Finished:
        """Screen a unit; idempotent."""
        result = self._screener.screen(unit)
        state = UnitState(
            unit=unit.id,
            file=unit.file,
            judges=self._screener.judges,
            tally=tally_of(result, reason_of),
            kept=runs(row.number for row in result.rows if row.outcome is Outcome.KEPT),
            parts=write_parts(self._output, result),
            signals=self._inspector.inspect(result.rows) if self._inspector else {},
        )
        # The cache holds whole texts: clear it after each unit.
        self._decode.cache_clear()
        self._output.write(f"{UNITS}/{unit.id}.json", state.to_json())
        if self._metrics is not None:
            self._metrics.unit(result, self._config, self._screener.judges["teacher"])
        return Finished(unit.id, len(result.rows))
