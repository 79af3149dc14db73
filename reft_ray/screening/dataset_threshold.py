"""The threshold of a dataset: from the stored verdicts of all its rows, and applied to each of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import orjson

from reft_ray.core.cascade import Combine, GuardedVerdict
from reft_ray.core.errors import ReftError
from reft_ray.core.job_threshold import JobThresholdRule
from reft_ray.core.verdict import Decision, Thresholds
from reft_ray.screening.config import ScreenConfig
from reft_ray.screening.outputs import Output
from reft_ray.screening.signals import sampled
from reft_ray.screening.stored_verdicts import JudgedUnit

THRESHOLD = ".screen/threshold.json"
SCORE_BINS = 64
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


def derive(units: Iterable[JudgedUnit], config: ScreenConfig, lines: int) -> DatasetThreshold:
    """The threshold of a dataset with this number of `lines`. Raises ReftError for units of different judges."""
    judges = None
    sample: list[float] = []
    share, count, histogram = min(1.0, SAMPLED_SCORES / max(1, lines)), 0, [0] * SCORE_BINS
    for unit in units:
        if judges is not None and unit.judges != judges:
            raise ReftError(
                "units of this output were judged by different teachers or thresholds; screen into a new directory"
            )
        judges = unit.judges
        for number, verdict in zip(unit.numbers, unit.verdicts, strict=True):
            if (score := verdict.prompt_score) is None:
                continue
            count += 1
            histogram[min(SCORE_BINS - 1, max(0, int((score + 1) / 2 * SCORE_BINS)))] += 1
            if sampled(number, share):
                sample.append(score)
    floor = config.job_threshold_floor
    if config.guards is not None and config.guard_combine is not Combine.ANY:
        return DatasetThreshold(None, _ASKED.format(config.guard_combine), floor, count, tuple(histogram))
    operator = Thresholds(**judges["thresholds"]) if judges else Thresholds(1.0, 1.0)
    found = JobThresholdRule(floor=floor).apply(sample, operator)
    return DatasetThreshold(found.own, found.fallback and str(found.fallback), floor, count, tuple(histogram))


def load_threshold(output: Output) -> DatasetThreshold | None:
    """The threshold that an earlier run found; None before the first pass has ended."""
    try:
        return DatasetThreshold.of(orjson.loads(output.read(THRESHOLD)))
    except FileNotFoundError:
        return None
