"""Keep the signals of training loops' data for findings, and an account of each of their models."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_SEQUENCE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Create the table, and add the column and the indexes that pages read by."""
    op.create_table(
        "training_signals",
        sa.Column("seq", _SEQUENCE, autoincrement=True, nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=False),
        sa.Column("base_model", sa.String(length=256), nullable=False),
        sa.Column("session_id", sa.String(length=40), nullable=False),
        sa.Column("data", sa.Integer(), nullable=False),
        sa.Column("signals", sa.JSON(), nullable=False),
        sa.Column("reported", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_training_signals")),
    )
    op.create_index(
        "ix_training_signals_project", "training_signals", ["project_id", "base_model", "seq"], unique=False
    )
    op.add_column("training_models", sa.Column("account", sa.JSON(), server_default="{}", nullable=False))
    op.create_index(op.f("ix_training_models_session_id"), "training_models", ["session_id"], unique=False)
    op.create_index(op.f("ix_training_checkpoints_session_id"), "training_checkpoints", ["session_id"], unique=False)


def downgrade() -> None:
    """Drop them."""
    op.drop_index(op.f("ix_training_checkpoints_session_id"), table_name="training_checkpoints")
    op.drop_index(op.f("ix_training_models_session_id"), table_name="training_models")
    op.drop_column("training_models", "account")
    op.drop_index("ix_training_signals_project", table_name="training_signals")
    op.drop_table("training_signals")
