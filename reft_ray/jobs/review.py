"""Rows that people decide about: the record, what a step files, and who decides."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any

from reft_ray.jobs.errors import InvalidError
from reft_ray.jobs.tables import reviews

NOTE_CHARACTERS = 4000
"""The longest note of an appeal, an answer or a signature."""

LEASE_SECONDS = 600.0
"""How long a claimed row is reserved for its reviewer."""

NO_MARGIN = 2.0
"""The margin of a row without a score: it is last in the order of nearness."""


class State(StrEnum):
    """The state of a row. `confirm`: a block was overturned and waits for a second person; `withheld`: people were not
    asked, because the job's policy does not wait for people."""

    PENDING = "pending"
    CONFIRM = "confirm"
    APPROVED = "approved"
    REJECTED = "rejected"
    WITHHELD = "withheld"


OPEN = (State.PENDING, State.CONFIRM)
"""States in which a row waits for a person."""

DECIDED = (State.APPROVED, State.REJECTED)


class Kind(StrEnum):
    """Why a row is reviewed: it was withheld, or it is in the random sample of kept rows, which estimates misses."""

    WITHHELD = "withheld"
    KEPT = "kept"


class Action(StrEnum):
    """A person's decision: `approve` means that the row may be trained on."""

    APPROVE = "approve"
    REJECT = "reject"


CODES: Mapping[Action, Mapping[str, str]] = {
    Action.APPROVE: {
        "harmless": "Nothing in it is harmful",
        "counter_speech": "It answers or condemns harm",
        "education": "Safety, medicine, law or history",
        "fiction": "Fiction without instructions",
        "other_harmless": "Another reason: see the comment",
    },
    Action.REJECT: {
        "harmful_request": "It asks for harm",
        "harmful_answer": "It answers with harm",
        "hidden_text": "It hides text, for example encoded",
        "illegal": "It must not be stored or shared",
        "other_harmful": "Another reason: see the comment",
    },
}
"""Reason codes of each decision."""


@dataclass(frozen=True, slots=True)
class Reviewer:
    """Who decides: `name` is unique and shown, `actor` is their form in the audit log."""

    name: str
    actor: Mapping[str, Any]


def checked_note(name: str, text: str) -> str:
    """The text without white space around it. Raises InvalidError for an empty one or a too long one."""
    if not text.strip() or len(text) > NOTE_CHARACTERS:
        raise InvalidError(f"{name}: write 1 to {NOTE_CHARACTERS} characters", name)
    return text.strip()


SERVICE = Reviewer("service", {"type": "session", "session": {"user": "service"}})
"""Who decides when an earlier decision about the same row is used again."""


@dataclass(frozen=True, slots=True)
class FiledRow:
    """A row as a step files it. Its text is `text_bytes` bytes from `text_offset` in the file `text_file`: one line of
    JSON with `messages`. Rows of one `cluster` are near-duplicates. A score may be NaN."""

    kind: Kind
    row_number: int
    line: int
    content_id: str
    decision: str
    reason: str
    text_file: str
    text_offset: int
    text_bytes: int
    cluster: str
    part: str = ""
    encoding: str | None = None
    score: float | None = None
    probability: float | None = None
    threshold: float | None = None
    teacher: str = ""
    judge: str = ""
    guard_score: float | None = None

    def values(self) -> dict[str, Any]:
        """The columns, with the distance of score and threshold; null for NaN."""
        found: dict[str, Any] = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }
        known = found["score"] is not None and found["threshold"] is not None
        found["margin"] = abs(found["score"] - found["threshold"]) if known else NO_MARGIN
        return {**found, "part": self.part[:256], "kind": str(self.kind)}


@dataclass(frozen=True, slots=True)
class Review:
    """A row in the queue. `version` counts its changes; times are seconds since the epoch."""

    id: str
    project_id: str
    job_id: str
    file_id: str
    kind: Kind
    row_number: int
    line: int
    content_id: str
    decision: str
    reason: str
    part: str
    encoding: str | None
    score: float | None
    probability: float | None
    threshold: float | None
    margin: float
    teacher: str
    judge: str
    guard_score: float | None
    cluster: str
    text_file: str
    text_offset: int
    text_bytes: int
    state: State
    version: int
    held_by: str | None
    held_until: float | None
    first_by: str | None
    reviewer: str | None
    code: str | None
    comment: str | None
    created_at: float
    decided_at: float | None

    def holder(self, now: float) -> str | None:
        """Who holds the row now."""
        return self.held_by if self.held_until is not None and self.held_until > now else None


COLUMNS = [reviews.c[field.name] for field in fields(Review)]


def review_of(row: Any) -> Review:
    """A row of COLUMNS."""
    values = dict(row._mapping)
    return Review(**{**values, "kind": Kind(values["kind"]), "state": State(values["state"])})
