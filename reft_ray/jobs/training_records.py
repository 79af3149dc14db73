"""What the records of the training API hold: sessions, models, checkpoints, samplers and events."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from sqlalchemy import Table

from reft_ray.jobs import ids
from reft_ray.jobs.errors import InvalidError

SCHEME = "tinker://"
Kind = Literal["weights", "sampler_weights", "external_weights"]
KINDS: tuple[Kind, ...] = ("weights", "sampler_weights", "external_weights")
ACTIVE, FAILED, UNLOADED = "active", "failed", "unloaded"
UNGATED, PENDING, PASSED, REFUSED = "none", "pending", "passed", "failed"

WORKER: Mapping[str, Any] = {"type": "session", "session": {"user": "training"}}
"""The actor of what a training worker does, in the audit log."""

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class TrainingSession:
    """A client's session: what it makes belongs to one training loop."""

    id: str
    organization_id: str
    project_id: str
    metadata: Mapping[str, Any]
    display_name: str | None
    created_at: float
    seen_at: float
    finished_at: float | None


@dataclass(frozen=True, slots=True)
class TrainingModel:
    """An adapter in training. `applied` and `saved` are numbers of requests (`jobs.training_queue`).

    `account` counts what the worker has done: `steps`, `data`, `withheld` and `masked` by reason, `tokens`,
    `withheld_tokens` and `unjudged_tokens`; `findings` has the severity of those reported, by name.
    """

    id: str
    session_id: str
    project_id: str
    base_model: str
    lora: Mapping[str, Any]
    metadata: Mapping[str, Any]
    state: str
    applied: int
    saved: int
    state_key: str | None
    created_at: float
    used_at: float
    account: Mapping[str, Any]

    @property
    def folder(self) -> str:
        """Its folder in the content store."""
        return f"training/{self.project_id}/{ids.derived_id('tm-', self.id)}"


@dataclass(frozen=True, slots=True)
class TrainingCheckpoint:
    """Saved weights, in the content store under `key`. `gate` is none, pending, passed or failed, with its `checks`."""

    id: str
    model_id: str
    session_id: str
    project_id: str
    kind: Kind
    name: str
    key: str
    bytes: int
    metadata: Mapping[str, Any]
    ephemeral: bool
    gate: str
    checks: Sequence[str]
    created_at: float
    expires_at: float | None


@dataclass(frozen=True, slots=True)
class Sampler:
    """What a client samples from: a checkpoint, or the base model itself."""

    id: str
    session_id: str
    project_id: str
    base_model: str
    checkpoint_id: str | None
    clients: int
    created_at: float


@dataclass(frozen=True, slots=True)
class TrainingEvent:
    """What happened at a request of a model, such as a datum that was withheld; never its text."""

    id: str
    model_id: str
    number: int
    type: str
    data: Mapping[str, Any]
    created_at: float


def columns(table: Table, record: type) -> list[Any]:
    """The columns of a record's fields, in their order."""
    return [table.c[field.name] for field in fields(record)]


def checkpoint_path(model_id: str, kind: Kind, name: str) -> str:
    """The name of a checkpoint for clients, its id: `tinker://MODEL/KIND/NAME`."""
    return f"{SCHEME}{model_id}/{kind}/{name}"


def check_name(name: str) -> str:
    """The name. Raises InvalidError for one that is not a plain file name."""
    if not _NAME.fullmatch(name):
        raise InvalidError("name: letters, digits, `.`, `_` and `-` are allowed, at most 128 of them", "path")
    return name
