"""The decision about the dataset as a whole."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from reft_ray.screening.config import Policy


class Status(StrEnum):
    """Whether the kept rows may be trained on."""

    PASSED = "passed"
    NEEDS_REVIEW = "needs_review"
    REFUSED = "refused"


class Counts(NamedTuple):
    """Rows by outcome; the four outcomes add up to all rows."""

    kept: int
    review: int
    blocked: int
    invalid: int

    @property
    def rows(self) -> int:
        """All rows."""
        return sum(self)

    @property
    def withheld(self) -> int:
        """Rows that the teacher or a guard withholds."""
        return self.review + self.blocked


class DatasetStatus(NamedTuple):
    """A status with its explanation."""

    status: Status
    reason: str


def dataset_status(
    counts: Counts, policy: Policy, max_reject_ratio: float | None, approved: int = 0, rejected: int = 0
) -> DatasetStatus:
    """The status of a dataset of which reviewers `approved` and `rejected` this many withheld rows.

    Approved rows no longer count as withheld. The ratio is over valid rows.
    """
    withheld = counts.withheld - approved
    valid = counts.rows - counts.invalid
    if max_reject_ratio is not None and valid and withheld / valid > max_reject_ratio:
        share = f"{withheld} of {valid} valid rows ({withheld / valid:.1%}) are withheld"
        return DatasetStatus(Status.REFUSED, f"{share}, more than the {max_reject_ratio:.1%} allowed")
    if policy is Policy.FAIL and (withheld or counts.invalid):
        return DatasetStatus(
            Status.REFUSED, f"{withheld} rows are withheld and {counts.invalid} are invalid; the policy allows none"
        )
    if policy is Policy.REVIEW and withheld - rejected:
        return DatasetStatus(Status.NEEDS_REVIEW, f"{withheld - rejected} withheld rows wait for review")
    if not counts.kept + approved:
        return DatasetStatus(Status.REFUSED, "no row is left to train on")
    return DatasetStatus(Status.PASSED, f"{counts.kept + approved} of {counts.rows} rows may be trained on")
