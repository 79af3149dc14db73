"""Add the tables of the training API: sessions, models, requests, checkpoints, samplers, events and workers."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_SEQUENCE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "training_requests",
        sa.Column("seq", _SEQUENCE, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("target", sa.String(length=320), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=False),
        sa.Column("base_model", sa.String(length=256), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=True),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("verdicts", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("result", sa.LargeBinary(), nullable=True),
        sa.Column("binary", sa.Boolean(), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("finished_at", sa.Float(), nullable=True),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_training_requests")),
        sa.UniqueConstraint("id", name=op.f("uq_training_requests_id")),
        sa.UniqueConstraint("target", "number", name=op.f("uq_training_requests_target")),
    )
    op.create_index("ix_training_requests_finished", "training_requests", ["finished_at"], unique=False)
    op.create_index("ix_training_requests_queue", "training_requests", ["status", "base_model", "seq"], unique=False)
    op.create_table(
        "training_scores",
        sa.Column("project_id", sa.String(length=40), nullable=False),
        sa.Column("base_model", sa.String(length=256), nullable=False),
        sa.Column("scores", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("project_id", "base_model", name=op.f("pk_training_scores")),
    )
    op.create_table(
        "training_sessions",
        sa.Column("seq", _SEQUENCE, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("organization_id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=False),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.Column("display_name", sa.String(length=256), nullable=True),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("seen_at", sa.Float(), nullable=False),
        sa.Column("finished_at", sa.Float(), nullable=True),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_training_sessions")),
        sa.UniqueConstraint("id", name=op.f("uq_training_sessions_id")),
    )
    op.create_index(op.f("ix_training_sessions_project_id"), "training_sessions", ["project_id"], unique=False)
    op.create_table(
        "training_workers",
        sa.Column("base_model", sa.String(length=256), nullable=False),
        sa.Column("owner", sa.String(length=64), nullable=False),
        sa.Column("until", sa.Float(), nullable=False),
        sa.Column("facts", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("base_model", name=op.f("pk_training_workers")),
    )
    op.create_table(
        "training_models",
        sa.Column("seq", _SEQUENCE, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(length=80), nullable=False),
        sa.Column("session_id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=False),
        sa.Column("base_model", sa.String(length=256), nullable=False),
        sa.Column("lora", sa.JSON(), nullable=False),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("applied", sa.Integer(), nullable=False),
        sa.Column("saved", sa.Integer(), nullable=False),
        sa.Column("state_key", sa.Text(), nullable=True),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("used_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["session_id"], ["training_sessions.id"], name=op.f("fk_training_models_session_id")),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_training_models")),
        sa.UniqueConstraint("id", name=op.f("uq_training_models_id")),
    )
    op.create_index(op.f("ix_training_models_project_id"), "training_models", ["project_id"], unique=False)
    op.create_table(
        "training_samplers",
        sa.Column("seq", _SEQUENCE, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(length=80), nullable=False),
        sa.Column("session_id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=False),
        sa.Column("base_model", sa.String(length=256), nullable=False),
        sa.Column("checkpoint_id", sa.String(length=320), nullable=True),
        sa.Column("clients", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["session_id"], ["training_sessions.id"], name=op.f("fk_training_samplers_session_id")),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_training_samplers")),
        sa.UniqueConstraint("id", name=op.f("uq_training_samplers_id")),
    )
    op.create_table(
        "training_checkpoints",
        sa.Column("seq", _SEQUENCE, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(length=320), nullable=False),
        sa.Column("model_id", sa.String(length=80), nullable=False),
        sa.Column("session_id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.Column("ephemeral", sa.Boolean(), nullable=False),
        sa.Column("gate", sa.String(length=16), nullable=False),
        sa.Column("checks", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=True),
        sa.ForeignKeyConstraint(["model_id"], ["training_models.id"], name=op.f("fk_training_checkpoints_model_id")),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_training_checkpoints")),
        sa.UniqueConstraint("id", name=op.f("uq_training_checkpoints_id")),
        sa.UniqueConstraint("model_id", "kind", "name", name=op.f("uq_training_checkpoints_model_id")),
    )
    op.create_index(op.f("ix_training_checkpoints_project_id"), "training_checkpoints", ["project_id"], unique=False)
    op.create_table(
        "training_events",
        sa.Column("seq", _SEQUENCE, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("model_id", sa.String(length=80), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("type", sa.String(length=32), nullable=False),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["training_models.id"], name=op.f("fk_training_events_model_id")),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_training_events")),
        sa.UniqueConstraint("id", name=op.f("uq_training_events_id")),
    )
    op.create_index(op.f("ix_training_events_model_id"), "training_events", ["model_id"], unique=False)


def downgrade() -> None:
    """Drop them."""
    op.drop_index(op.f("ix_training_events_model_id"), table_name="training_events")
    op.drop_table("training_events")
    op.drop_index(op.f("ix_training_checkpoints_project_id"), table_name="training_checkpoints")
    op.drop_table("training_checkpoints")
    op.drop_table("training_samplers")
    op.drop_index(op.f("ix_training_models_project_id"), table_name="training_models")
    op.drop_table("training_models")
    op.drop_table("training_workers")
    op.drop_index(op.f("ix_training_sessions_project_id"), table_name="training_sessions")
    op.drop_table("training_sessions")
    op.drop_table("training_scores")
    op.drop_index("ix_training_requests_queue", table_name="training_requests")
    op.drop_index("ix_training_requests_finished", table_name="training_requests")
    op.drop_table("training_requests")
