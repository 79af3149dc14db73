"""The tables of the training API (`jobs.training`): loops of customers that send their own gradients' data."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    Table,
    Text,
    UniqueConstraint,
)

from reft_ray.jobs.tables import Sequence, metadata

training_sessions = Table(
    "training_sessions",
    metadata,
    Column("seq", Sequence, primary_key=True, autoincrement=True),
    Column("id", String(40), nullable=False, unique=True),
    Column("organization_id", String(40), nullable=False),
    Column("project_id", String(40), nullable=False),
    Column("metadata", JSON, nullable=False),
    Column("display_name", String(256)),
    Column("created_at", Float, nullable=False),
    Column("seen_at", Float, nullable=False),
    Column("finished_at", Float),
    Index(None, "project_id"),
)

# `applied` is the last request that the model has seen the effect of, `saved` the one that is in `state_uri`; `account`
# counts its steps, data and tokens.
training_models = Table(
    "training_models",
    metadata,
    Column("seq", Sequence, primary_key=True, autoincrement=True),
    Column("id", String(80), nullable=False, unique=True),
    Column("session_id", ForeignKey("training_sessions.id"), nullable=False),
    Column("project_id", String(40), nullable=False),
    Column("base_model", String(256), nullable=False),
    Column("lora", JSON, nullable=False),
    Column("metadata", JSON, nullable=False),
    Column("state", String(16), nullable=False),
    Column("applied", Integer, nullable=False),
    Column("saved", Integer, nullable=False),
    Column("state_key", Text),
    Column("created_at", Float, nullable=False),
    Column("used_at", Float, nullable=False),
    Column("account", JSON, nullable=False, server_default="{}"),
    Index(None, "project_id"),
    Index(None, "session_id"),
)

training_requests = Table(
    "training_requests",
    metadata,
    Column("seq", Sequence, primary_key=True, autoincrement=True),
    Column("id", String(40), nullable=False, unique=True),
    Column("target", String(320), nullable=False),
    Column("number", BigInteger, nullable=False),
    Column("kind", String(32), nullable=False),
    Column("project_id", String(40), nullable=False),
    Column("base_model", String(256), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("payload", LargeBinary),
    Column("status", String(16), nullable=False),
    Column("verdicts", JSON(none_as_null=True)),
    Column("result", LargeBinary),
    Column("binary", Boolean, nullable=False),
    Column("error", Text),
    Column("created_at", Float, nullable=False),
    Column("finished_at", Float),
    UniqueConstraint("target", "number"),
    Index("ix_training_requests_queue", "status", "base_model", "seq"),
    Index("ix_training_requests_finished", "finished_at"),
)

training_checkpoints = Table(
    "training_checkpoints",
    metadata,
    Column("seq", Sequence, primary_key=True, autoincrement=True),
    Column("id", String(320), nullable=False, unique=True),
    Column("model_id", ForeignKey("training_models.id"), nullable=False),
    Column("session_id", String(40), nullable=False),
    Column("project_id", String(40), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("name", String(128), nullable=False),
    Column("key", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("metadata", JSON, nullable=False),
    Column("ephemeral", Boolean, nullable=False),
    Column("gate", String(16), nullable=False),
    Column("checks", JSON, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    UniqueConstraint("model_id", "kind", "name"),
    Index(None, "project_id"),
    Index(None, "session_id"),
)

training_samplers = Table(
    "training_samplers",
    metadata,
    Column("seq", Sequence, primary_key=True, autoincrement=True),
    Column("id", String(80), nullable=False, unique=True),
    Column("session_id", ForeignKey("training_sessions.id"), nullable=False),
    Column("project_id", String(40), nullable=False),
    Column("base_model", String(256), nullable=False),
    Column("checkpoint_id", String(320)),
    Column("clients", Integer, nullable=False),
    Column("created_at", Float, nullable=False),
)

training_events = Table(
    "training_events",
    metadata,
    Column("seq", Sequence, primary_key=True, autoincrement=True),
    Column("id", String(40), nullable=False, unique=True),
    Column("model_id", ForeignKey("training_models.id"), nullable=False),
    Column("number", BigInteger, nullable=False),
    Column("type", String(32), nullable=False),
    Column("data", JSON, nullable=False),
    Column("created_at", Float, nullable=False),
    Index(None, "model_id"),
)

# The last scores of a project's data on a base model, over all its sessions.
training_scores = Table(
    "training_scores",
    metadata,
    Column("project_id", String(40), primary_key=True),
    Column("base_model", String(256), primary_key=True),
    Column("scores", JSON, nullable=False),
)

# Signals of the last data of a project on a base model, a row per request, for findings; no text.
training_signals = Table(
    "training_signals",
    metadata,
    Column("seq", Sequence, primary_key=True, autoincrement=True),
    Column("project_id", String(40), nullable=False),
    Column("base_model", String(256), nullable=False),
    Column("session_id", String(40), nullable=False),
    Column("data", Integer, nullable=False),
    Column("signals", JSON, nullable=False),
    Column("reported", JSON, nullable=False),
    Column("created_at", Float, nullable=False),
    Index("ix_training_signals_project", "project_id", "base_model", "seq"),
)

# The one worker of a base model, and what it says about that model.
training_workers = Table(
    "training_workers",
    metadata,
    Column("base_model", String(256), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("until", Float, nullable=False),
    Column("facts", JSON, nullable=False),
)
