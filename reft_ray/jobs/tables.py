"""The tables as SQLAlchemy Core, but those in `training_tables`; a test compares both with Alembic's migrations."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite autoincrements only columns of exactly the type INTEGER.
Sequence = BigInteger().with_variant(Integer, "sqlite")

organizations = Table(
    "organizations",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("name", String(128), nullable=False, unique=True),
    Column("created_at", Float, nullable=False),
)

projects = Table(
    "projects",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("organization_id", ForeignKey("organizations.id"), nullable=False),
    Column("name", String(128), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("limits", JSON, nullable=False),
    UniqueConstraint("organization_id", "name"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("project_id", ForeignKey("projects.id"), nullable=False),
    Column("name", String(128), nullable=False),
    Column("digest", String(64), nullable=False, unique=True),
    Column("hint", String(16), nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("role", String(16), nullable=False, server_default="owner"),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Column("revoked_at", Float),
)

files = Table(
    "files",
    metadata,
    Column("seq", Sequence, primary_key=True, autoincrement=True),
    Column("id", String(40), nullable=False, unique=True),
    Column("project_id", String(40), nullable=False),
    Column("filename", String(512), nullable=False),
    Column("purpose", String(40), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("status", String(16), nullable=False),
    Column("status_details", Text),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Column("deleted_at", Float),
    Column("parent_id", String(40)),
    Index(None, "project_id"),
    Index(None, "parent_id"),
)

uploads = Table(
    "uploads",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("project_id", String(40), nullable=False),
    Column("filename", String(512), nullable=False),
    Column("purpose", String(40), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("mime_type", String(128), nullable=False),
    Column("status", String(16), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("file_expires_after", Integer),
    Column("file_id", String(40)),
)

upload_parts = Table(
    "upload_parts",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("upload_id", ForeignKey("uploads.id"), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("created_at", Float, nullable=False),
    Index(None, "upload_id"),
)

jobs = Table(
    "jobs",
    metadata,
    Column("seq", Sequence, primary_key=True, autoincrement=True),
    Column("id", String(40), nullable=False, unique=True),
    Column("organization_id", String(40), nullable=False),
    Column("project_id", String(40), nullable=False),
    Column("status", String(20), nullable=False),
    Column("spec", JSON, nullable=False),
    # Copies from the spec, so that no query has to parse user input.
    Column("model", String(256), nullable=False),
    Column("training_file", String(40), nullable=False),
    Column("validation_file", String(40)),
    Column("metadata", JSON, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("queued_at", Float),
    Column("started_at", Float),
    Column("finished_at", Float),
    Column("estimated_finish", Float),
    Column("trained_tokens", BigInteger),
    Column("fine_tuned_model", String(256)),
    Column("error", JSON(none_as_null=True)),
    Column("result_files", JSON, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("failures", Integer, nullable=False),
    Column("launched_at", Float),
    Column("handle", String(256)),
    Column("lease_owner", String(64)),
    Column("lease_until", Float),
    Column("cleaned_at", Float),
    Index(None, "project_id"),
    Index(None, "status"),
)

job_steps = Table(
    "job_steps",
    metadata,
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("name", String(32), primary_key=True),
    Column("result", JSON, nullable=False),
    Column("finished_at", Float, nullable=False),
)

job_events = Table(
    "job_events",
    metadata,
    Column("seq", Sequence, primary_key=True, autoincrement=True),
    Column("id", String(40), nullable=False, unique=True),
    Column("job_id", ForeignKey("jobs.id"), nullable=False),
    Column("key", String(128)),
    Column("level", String(8), nullable=False),
    Column("type", String(32), nullable=False),
    Column("message", Text, nullable=False),
    Column("data", JSON, nullable=False),
    Column("created_at", Float, nullable=False),
    UniqueConstraint("job_id", "key"),
)

job_checkpoints = Table(
    "job_checkpoints",
    metadata,
    Column("seq", Sequence, primary_key=True, autoincrement=True),
    Column("id", String(40), nullable=False, unique=True),
    Column("job_id", ForeignKey("jobs.id"), nullable=False),
    Column("step_number", Integer, nullable=False),
    Column("uri", Text, nullable=False),
    Column("metrics", JSON, nullable=False),
    Column("created_at", Float, nullable=False),
    UniqueConstraint("job_id", "step_number"),
)

checkpoint_permissions = Table(
    "checkpoint_permissions",
    metadata,
    Column("seq", Sequence, primary_key=True, autoincrement=True),
    Column("id", String(40), nullable=False, unique=True),
    Column("checkpoint", String(320), nullable=False),
    Column("project_id", String(40), nullable=False),
    Column("created_at", Float, nullable=False),
    UniqueConstraint("checkpoint", "project_id"),
)

models = Table(
    "models",
    metadata,
    Column("id", String(320), primary_key=True),
    Column("project_id", String(40), nullable=False),
    Column("organization_id", String(40), nullable=False),
    Column("job_id", String(40), nullable=False),
    Column("base_model", String(256), nullable=False),
    Column("uri", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("deleted_at", Float),
    Index(None, "project_id"),
)

audit_log = Table(
    "audit_log",
    metadata,
    Column("seq", Sequence, primary_key=True, autoincrement=False),
    Column("id", String(40), nullable=False, unique=True),
    Column("effective_at", Float, nullable=False),
    Column("type", String(64), nullable=False),
    Column("actor", JSON, nullable=False),
    Column("project_id", String(40)),
    Column("data", JSON, nullable=False),
    Column("previous", String(64), nullable=False),
    Column("hash", String(64), nullable=False),
)

audit_head = Table(
    "audit_head",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("seq", BigInteger, nullable=False),
    Column("hash", String(64), nullable=False),
)

webhook_endpoints = Table(
    "webhook_endpoints",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("project_id", String(40), nullable=False),
    Column("url", Text, nullable=False),
    Column("secret", String(128), nullable=False),
    Column("events", JSON, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("failures", Integer, nullable=False, server_default="0"),
    Column("failing_since", Float),
    Column("retry_at", Float),
    Column("disabled_at", Float),
    Index(None, "project_id"),
)

webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    Column("seq", Sequence, primary_key=True, autoincrement=True),
    Column("event_id", String(40), nullable=False),
    Column("endpoint_id", ForeignKey("webhook_endpoints.id", ondelete="CASCADE"), nullable=False),
    Column("type", String(64), nullable=False),
    Column("object_id", String(40), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("next_at", Float),
    Column("attempts", Integer, nullable=False),
    Column("delivered_at", Float),
    Column("status_code", Integer),
    UniqueConstraint("event_id", "endpoint_id"),
    Index(None, "next_at"),
)

rate_buckets = Table(
    "rate_buckets",
    metadata,
    Column("owner", String(40), primary_key=True),
    Column("name", String(32), primary_key=True),
    Column("level", Float, nullable=False),
    Column("updated_at", Float, nullable=False),
)

# Withheld rows and a sample of kept ones, for people to decide about. The text stays in the file `text_file`.
reviews = Table(
    "reviews",
    metadata,
    Column("seq", Sequence, primary_key=True, autoincrement=True),
    Column("id", String(40), nullable=False, unique=True),
    Column("project_id", String(40), nullable=False),
    Column("job_id", ForeignKey("jobs.id"), nullable=False),
    Column("file_id", String(40), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("row_number", BigInteger, nullable=False),
    Column("line", BigInteger, nullable=False),
    Column("content_id", String(40), nullable=False),
    Column("decision", String(16), nullable=False),
    Column("reason", String(64), nullable=False),
    Column("part", String(256), nullable=False),
    Column("encoding", String(64)),
    Column("score", Float),
    Column("probability", Float),
    Column("threshold", Float),
    Column("margin", Float, nullable=False),
    Column("teacher", String(128), nullable=False),
    Column("judge", String(128), nullable=False),
    Column("guard_score", Float),
    Column("cluster", String(40), nullable=False),
    Column("text_file", String(40), nullable=False),
    Column("text_offset", BigInteger, nullable=False),
    Column("text_bytes", BigInteger, nullable=False),
    Column("state", String(16), nullable=False),
    Column("version", Integer, nullable=False),
    Column("held_by", String(200)),
    Column("held_until", Float),
    Column("first_by", String(200)),
    Column("reviewer", String(200)),
    Column("code", String(32)),
    Column("comment", Text),
    Column("created_at", Float, nullable=False),
    Column("decided_at", Float),
    UniqueConstraint("job_id", "row_number"),
    Index("ix_reviews_queue", "state", "margin", "seq"),
    Index("ix_reviews_age", "state", "seq", "kind"),
    Index("ix_reviews_job", "job_id", "state", "margin", "seq"),
    Index("ix_reviews_cluster", "job_id", "cluster", "state"),
    Index("ix_reviews_content", "project_id", "content_id"),
)

# How many rows `reviews` has: its triggers keep this, because PostgreSQL reads every row to count them.
review_counts = Table(
    "review_counts",
    metadata,
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("kind", String(16), primary_key=True),
    Column("reason", String(64), primary_key=True),
    Column("teacher", String(128), primary_key=True),
    Column("state", String(16), primary_key=True),
    Column("project_id", String(40), nullable=False),
    Column("file_id", String(40), nullable=False),
    Column("total", BigInteger, nullable=False),
    Index(None, "project_id"),
)

# The few kept rows among the many withheld ones.
_where_kept: dict[str, Any] = {f"{name}_where": reviews.c.kind == "kept" for name in ("sqlite", "postgresql")}
Index("ix_reviews_kept", reviews.c.state, reviews.c.margin, reviews.c.seq, **_where_kept)
Index("ix_reviews_kept_age", reviews.c.state, reviews.c.seq, **_where_kept)

appeals = Table(
    "appeals",
    metadata,
    Column("seq", Sequence, primary_key=True, autoincrement=True),
    Column("id", String(40), nullable=False, unique=True),
    Column("project_id", String(40), nullable=False),
    Column("job_id", ForeignKey("jobs.id"), nullable=False),
    Column("review_id", String(40)),
    Column("state", String(16), nullable=False),
    Column("note", Text, nullable=False),
    Column("author", String(200), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("answer", Text),
    Column("answered_by", String(200)),
    Column("answered_at", Float),
    Index(None, "state"),
    Index(None, "project_id"),
)

# Students that failed the gate and wait for two people to release them.
releases = Table(
    "releases",
    metadata,
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("project_id", String(40), nullable=False),
    Column("state", String(16), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("signed_by", String(200)),
    Column("signed_note", Text),
    Column("signed_at", Float),
    Column("decided_by", String(200)),
    Column("decided_note", Text),
    Column("decided_at", Float),
    Index(None, "state"),
)

service_secrets = Table(
    "service_secrets",
    metadata,
    Column("name", String(40), primary_key=True),
    Column("value", String(128), nullable=False),
)
