"""The threshold of a dataset: from the stored verdicts of all its rows, and applied to each of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import orjson

from reft_ray.core.cascade import Combine, GuardedVerdict
from reft_ray.core.errors import ReftError
from reft_ray.core.job_threshold import JobThresholdRule
from reft_ray.core.verdict import Decision, Thresholds
from reft_ray.screening.config import ScreenConfig
from reft_ray.screening.outputs import Output
from reft_ray.screening.stored_verdicts import SCORE_BINS, UnitScores

THRESHOLD = ".screen/threshold.json"
SAMPLED_SCORES = 100_000
"""About this many scores are kept in memory for the rule; of more rows a sample by row number."""
_ASKED = "the guards decide about rows that the teacher sends to review (--guard-combine {})"


@dataclass(frozen=True, slots=True)
class DatasetThreshold:
    """The review threshold that a dataset's own scores give, on the scale of prompts, or why it has none (`fallback`).

    `floor` is the lowest value that it may have. `scores` counts the rows that the teacher scored and `histogram` their
    scores in equal bins over [-1, 1]; the score of an answer counts less its offset. `rows` are those that only this
    threshold withholds: between it and the review threshold.
    """

    own: float | None
    fallback: str | None
    floor: float
    scores: int
    histogram: tuple[int, ...]
    rows: int = 0

    @property
    def summary(self) -> str:
        """The result in one sentence."""
        if self.own is None:
            return f"the operator's thresholds alone apply to this dataset ({self.fallback})"
        between = f"{self.rows:,} row{'' if self.rows == 1 else 's'} between it and the operator's review threshold"
        return f"the threshold of this dataset is {self.own:.3f}; {between} went to review"

    @classmethod
    def of(cls, values: dict[str, Any]) -> DatasetThreshold:
        """The threshold from its JSON values."""
        return cls(**values | {"histogram": tuple(values["histogram"])})

    def apply(self, verdict: GuardedVerdict) -> GuardedVerdict:
        """The verdict under this threshold: a row that the others keep may need review; the reverse never happens."""
        score = verdict.prompt_score
        if self.own is None or score is None or verdict.decision is not Decision.ALLOW or score <= self.own:
            return verdict
        return replace(verdict, decision=Decision.REVIEW, by_job_threshold=True)


def score_share(rows: int) -> float:
    """The share of rows whose scores are kept for the rule."""
    return min(1.0, SAMPLED_SCORES / max(1, rows))


def derive(units: Iterable[UnitScores], config: ScreenConfig) -> DatasetThreshold:
    """The threshold of a dataset. Raises ReftError for units of different judges."""
    judges = None
    sample: list[float] = []
    histogram = np.zeros(SCORE_BINS, dtype=np.int64)
    for unit in units:
        if judges is not None and unit.judges != judges:
            raise ReftError(
                "units of this output were judged by different teachers or thresholds; screen into a new directory"
            )
        judges = unit.judges
        histogram += unit.histogram
        sample += unit.sample
    counts = tuple(histogram.tolist())
    floor = config.job_threshold_floor
    if config.guards is not None and config.guard_combine is not Combine.ANY:
        return DatasetThreshold(None, _ASKED.format(config.guard_combine), floor, sum(counts), counts)
    operator = Thresholds(**judges["thresholds"]) if judges else Thresholds(1.0, 1.0)
    found = JobThresholdRule(floor=floor).apply(sample, operator)
    return DatasetThreshold(found.own, found.fallback and str(found.fallback), floor, sum(counts), counts)


def load_threshold(output: Output) -> DatasetThreshold | None:
    """The threshold that an earlier run found; None before the first pass has ended."""
    try:
        return DatasetThreshold.of(orjson.loads(output.read(THRESHOLD)))
    except FileNotFoundError:
        return None
