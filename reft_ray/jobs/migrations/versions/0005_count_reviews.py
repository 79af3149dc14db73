"""Add counts of reviews, which the database keeps itself: whatever version writes rows, their counts agree."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_KEY = "job_id, kind, reason, teacher, state"
_COLUMNS = f"{_KEY}, project_id, file_id"
_INDICES = {
    "job": (["job_id", "state", "margin", "seq", "kind", "reason"], ["job_id", "state", "margin", "seq"]),
    "counts": (["state", "kind", "reason", "project_id"], None),
    "age": (["state", "seq"], ["state", "seq", "kind"]),
    "cluster": (["job_id", "cluster"], ["job_id", "cluster", "state"]),
    "kept": (None, ["state", "margin", "seq"]),
    "kept_age": (None, ["state", "seq"]),
}
_EVENTS = {"insert": "INSERT", "update": "UPDATE OF state", "delete": "DELETE"}


def _counted(row: str, step: int) -> str:
    values = ", ".join(f"{row}.{column}" for column in _COLUMNS.split(", "))
    return (
        f"INSERT INTO review_counts ({_COLUMNS}, total) VALUES ({values}, {step}) "  # noqa: S608
        f"ON CONFLICT ({_KEY}) DO UPDATE SET total = review_counts.total + {step};"
    )


def _changes(name: str) -> str:
    removed, added = _counted("OLD", -1), _counted("NEW", 1)
    return {"insert": added, "update": removed + added, "delete": removed}[name]


def upgrade() -> None:
    """Create the table with what there is, and the triggers that keep it."""
    op.create_table(
        "review_counts",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.String(length=64), nullable=False),
        sa.Column("teacher", sa.String(length=128), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=False),
        sa.Column("file_id", sa.String(length=40), nullable=False),
        sa.Column("total", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_review_counts_job_id")),
        sa.PrimaryKeyConstraint(*_KEY.split(", "), name=op.f("pk_review_counts")),
    )
    op.create_index(op.f("ix_review_counts_project_id"), "review_counts", ["project_id"])
    for name, event in _EVENTS.items():
        if op.get_bind().dialect.name == "sqlite":
            op.execute(f"CREATE TRIGGER count_reviews_{name} AFTER {event} ON reviews BEGIN {_changes(name)} END")
        else:
            function = f"BEGIN {_changes(name)} RETURN NULL; END"
            op.execute(f"CREATE FUNCTION count_reviews_{name}() RETURNS trigger LANGUAGE plpgsql AS $$ {function} $$")
            op.execute(
                f"CREATE TRIGGER count_reviews_{name} AFTER {event} ON reviews "
                f"FOR EACH ROW EXECUTE FUNCTION count_reviews_{name}()"
            )
    # After the triggers, which keep other writers out until this is committed.
    op.execute(
        f"INSERT INTO review_counts ({_COLUMNS}, total) "  # noqa: S608
        f"SELECT {_COLUMNS}, count(*) FROM reviews GROUP BY {_COLUMNS}"
    )
    _replace_indices(new=True)


def downgrade() -> None:
    """Drop them."""
    _replace_indices(new=False)
    for name in _EVENTS:
        sqlite = op.get_bind().dialect.name == "sqlite"
        op.execute(f"DROP TRIGGER count_reviews_{name}" if sqlite else f"DROP FUNCTION count_reviews_{name}() CASCADE")
    op.drop_table("review_counts")


def _replace_indices(new: bool) -> None:
    for name, (before, after) in _INDICES.items():
        old, wanted = (before, after) if new else (after, before)
        if old:
            op.drop_index(f"ix_reviews_{name}", "reviews")
        if wanted:
            where = sa.text("kind = 'kept'") if name.startswith("kept") else None
            op.create_index(f"ix_reviews_{name}", "reviews", wanted, sqlite_where=where, postgresql_where=where)
