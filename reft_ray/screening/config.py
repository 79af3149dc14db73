"""The configuration of a screening, with its defaults."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from reft_ray.core.cascade import Combine, Guard, Order
from reft_ray.core.conversation import Conversation
from reft_ray.core.decoding import readings
from reft_ray.core.errors import UsageError
from reft_ray.core.job_threshold import FLOOR
from reft_ray.core.scoring import Scorer
from reft_ray.core.verdict import Thresholds
from reft_ray.rows.checks import Fault
from reft_ray.rows.format import Format
from reft_ray.screening.guards import Decode, Teacher
from reft_ray.screening.pieces import SPAN_BYTES
from reft_ray.screening.ranges import Limits
from reft_ray.screening.sources import Container, Source

ScorerFactory = Callable[[], Scorer | Teacher]
RowCheck = Callable[[Conversation], Fault | None]


class Policy(StrEnum):
    """What happens to withheld rows.

    `FILTER` leaves them out. `REVIEW` releases no rows until a person has decided about every withheld one. `FAIL`
    refuses the dataset when a row is withheld or invalid.
    """

    FILTER = "filter"
    REVIEW = "review"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class ScreenConfig:
    """How a screening reads rows, judges them and runs.

    - `columns` maps our field names (and keys of turns) to the file's, `speakers` the file's names of ShareGPT speakers
      to roles; `source_column` names a column to break the report down by.
    - `row_check` makes a check of what training reads of a row, e.g. `hf.row_check.TemplateCheck`: a row with a fault
      is invalid. It must pickle.
    - `max_reject_ratio`: above this share of withheld rows among valid ones the dataset is refused, whatever the
      policy: where many rows are harmful, the kept ones hold the harmful rows that the filter missed.
    - `job_threshold`: rows above the threshold that the dataset's own scores give (`core.job_threshold`) go to review
      as well; this takes a second pass over the input, without the teacher. It is never below `job_threshold_floor`.
    - `languages`: ISO 639-1 codes that the teacher covers. `findings_off`: names of findings not to report;
      `findings=False` computes none.
    - Up to `small_rows` rows are screened in this process; more by `actors` Ray actors, each with its own scorer,
      `cpus_per_actor` and `gpus_per_actor` (fractions allowed). With `threads` above 0 the work is done in this many
      threads of this process instead, each with its own teacher: for teachers over HTTP.
    - `batch_rows` rows go to the scorer at a time; the scores of the last `cache_texts` texts are cached.
    """

    format: Format | None = None
    container: Container | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    speakers: Mapping[str, str] = field(default_factory=dict)
    source_column: str | None = None
    control_tokens: frozenset[str] = frozenset()
    row_check: Callable[[], RowCheck] | None = None
    thresholds: Thresholds | None = None
    job_threshold: bool = True
    job_threshold_floor: float = FLOOR
    guards: Callable[[], Sequence[Guard]] | None = None
    guard_combine: Combine = Combine.ANY
    guard_order: Order = Order.AFTER
    policy: Policy = Policy.FILTER
    max_reject_ratio: float | None = None
    languages: frozenset[str] = frozenset({"en"})
    findings: bool = True
    findings_off: frozenset[str] = frozenset()
    limits: Limits = field(default_factory=Limits)
    batch_rows: int = 256
    cache_texts: int = 100_000
    small_rows: int = 10_000
    actors: int = 1
    threads: int = 0
    cpus_per_actor: float = 1.0
    gpus_per_actor: float = 0.0
    decode: Decode = readings

    def __post_init__(self) -> None:
        if self.max_reject_ratio is not None and not 0.0 <= self.max_reject_ratio <= 1.0:
            raise UsageError(f"max_reject_ratio is a share in [0, 1], got {self.max_reject_ratio}")
        if not -1.0 <= self.job_threshold_floor <= 1.0:
            raise UsageError(f"job_threshold_floor is a score in [-1, 1], got {self.job_threshold_floor}")
        for name in ("batch_rows", "cache_texts", "actors"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.cpus_per_actor < 0 or self.gpus_per_actor < 0:
            raise UsageError("cpus_per_actor and gpus_per_actor cannot be negative")

    def fingerprint(self, sources: Sequence[Source]) -> str:
        """A hash of the input and of all settings that change outcomes; equal in a resumed run."""
        thresholds = self.thresholds
        settings = {
            "sources": [[s.name, s.size, s.version, s.container, s.compression] for s in sources],
            "format": self.format,
            "columns": sorted(self.columns.items()),
            **({"speakers": sorted(self.speakers.items())} if self.speakers else {}),
            **({"row_check": True} if self.row_check else {}),
            "source_column": self.source_column,
            "control_tokens": sorted(self.control_tokens),
            "thresholds": thresholds and [thresholds.review, thresholds.block],
            "job_threshold": [self.job_threshold, self.job_threshold_floor],
            "guard": [self.guards is not None, self.guard_combine, self.guard_order],
            "findings": [self.findings, sorted(self.languages)],
            "limits": [self.limits.rows, self.limits.bytes, self.limits.row_bytes, SPAN_BYTES],
            "decode": self.decode.__qualname__,
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
