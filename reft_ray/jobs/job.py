"""The records of a finetuning job: its spec, its status and the allowed transitions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Literal

Auto = Literal["auto"]
Policy = Literal["filter", "review", "fail"]


class Status(StrEnum):
    """The status of a job: OpenAI's, and `paused`."""

    VALIDATING = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


TRANSITIONS: Mapping[Status, frozenset[Status]] = {
    Status.VALIDATING: frozenset({Status.QUEUED, Status.PAUSED, Status.FAILED, Status.CANCELLED}),
    Status.QUEUED: frozenset({Status.RUNNING, Status.PAUSED, Status.FAILED, Status.CANCELLED}),
    Status.RUNNING: frozenset({Status.SUCCEEDED, Status.PAUSED, Status.FAILED, Status.CANCELLED}),
    Status.PAUSED: frozenset({Status.VALIDATING, Status.QUEUED, Status.CANCELLED}),
    Status.SUCCEEDED: frozenset(),
    Status.FAILED: frozenset(),
    Status.CANCELLED: frozenset(),
}

TERMINAL = frozenset(status for status, targets in TRANSITIONS.items() if not targets)
ACTIVE = frozenset({Status.VALIDATING, Status.RUNNING})
"""Statuses in which a driver must run."""


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """OpenAI's hyperparameters; `auto` means the preset's value."""

    n_epochs: int | Auto = "auto"
    batch_size: int | Auto = "auto"
    learning_rate_multiplier: float | Auto = "auto"


@dataclass(frozen=True, slots=True)
class Options:
    """Our extension (`extra_body={"reft": {...}}`); None means the value of the operator's preset.

    `format`, `columns` and `speakers` say how to read the files where they do not; `skip_invalid` leaves invalid rows
    out instead of refusing the file.
    `gate` holds limits of the release gate that are stricter than the operator's.
    """

    policy: Policy = "filter"
    max_reject_ratio: float = 0.5
    threshold: float | None = None
    kd_weight: float | None = None
    temperature: float | None = None
    alignment_dataset: str | None = None
    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    speakers: Mapping[str, str] = field(default_factory=dict)
    skip_invalid: bool = False
    gate: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class JobSpec:
    """The user's request; it never changes after creation."""

    model: str
    training_file: str
    seed: int
    validation_file: str | None = None
    suffix: str | None = None
    hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)
    options: Options = field(default_factory=Options)
    integrations: tuple[Mapping[str, Any], ...] = ()
    preset: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON for `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> JobSpec:
        """Read what `to_json` wrote."""
        return cls(
            **{
                **document,
                "hyperparameters": Hyperparameters(**document["hyperparameters"]),
                "options": Options(**document["options"]),
                "integrations": tuple(document["integrations"]),
            }
        )


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job failed, in OpenAI's three keys."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """One row of `jobs`. Times are seconds since the epoch."""

    id: str
    organization_id: str
    project_id: str
    status: Status
    spec: JobSpec
    metadata: Mapping[str, str]
    created_at: float
    queued_at: float | None
    started_at: float | None
    finished_at: float | None
    estimated_finish: float | None
    trained_tokens: int | None
    fine_tuned_model: str | None
    error: JobError | None
    result_files: tuple[str, ...]
    attempt: int
    failures: int
    launched_at: float | None
    handle: str | None
    lease_owner: str | None
    lease_until: float | None

    @property
    def model_name(self) -> str:
        """The finished student's name: `ft:{base}:{org}:{suffix}:{8 characters}`, without slashes."""
        base = self.spec.model.replace("/", "--")
        organization = self.organization_id.removeprefix("org-")
        return f"ft:{base}:{organization}:{self.spec.suffix or ''}:{self.id[-8:]}"

    def checkpoint_name(self, step: int) -> str:
        """The model name of a checkpoint."""
        return f"{self.model_name}:ckpt-step-{step}"


@dataclass(frozen=True, slots=True)
class Event:
    """An event of a job. `data` holds numbers and ids, never row texts."""

    message: str
    level: Literal["info", "warn", "error"] = "info"
    type: str = "message"
    data: Mapping[str, Any] = field(default_factory=dict)
    key: str | None = None
    """An event with a key is written once per job, so a repeated step does not repeat it."""


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """An event with its id and time."""

    id: str
    created_at: float
    event: Event


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A saved state of a running job."""

    id: str
    job_id: str
    step_number: int
    uri: str
    metrics: Mapping[str, float]
    created_at: float
