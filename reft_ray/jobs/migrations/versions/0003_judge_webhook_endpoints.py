"""Add what is known of a webhook endpoint that fails."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_TIMES = ("failing_since", "retry_at", "disabled_at")


def upgrade() -> None:
    """Add the columns."""
    op.add_column("webhook_endpoints", sa.Column("failures", sa.Integer(), server_default="0", nullable=False))
    for name in _TIMES:
        op.add_column("webhook_endpoints", sa.Column(name, sa.Float(), nullable=True))


def downgrade() -> None:
    """Drop them."""
    for name in (*_TIMES, "failures"):
        op.drop_column("webhook_endpoints", name)
