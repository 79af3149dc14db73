"""Name the model and the files of a job in columns of their own."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_LENGTHS = {"model": 256, "training_file": 40, "validation_file": 40}


def upgrade() -> None:
    """Apply the change."""
    for name, length in _LENGTHS.items():
        op.add_column("jobs", sa.Column(name, sa.String(length=length), nullable=True))
    jobs = sa.table("jobs", sa.column("seq"), sa.column("spec", sa.JSON()), *map(sa.column, _LENGTHS))
    connection = op.get_bind()
    # Read here and not in SQL: there are specs that a database cannot parse.
    for seq, spec in connection.execute(sa.select(jobs.c.seq, jobs.c.spec)).all():
        values = {name: spec[name] for name in _LENGTHS}
        connection.execute(sa.update(jobs).where(jobs.c.seq == seq).values(**values))


def downgrade() -> None:
    """Take the change back."""
    for name in _LENGTHS:
        op.drop_column("jobs", name)
