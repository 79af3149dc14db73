"""What is kept of the data of training loops besides their verdicts: signals for findings, and the models' accounts.

Neither has text. Signals are those of the last data of a project, over all its sessions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from reft_ray.jobs.database import Database
from reft_ray.jobs.training_tables import training_models, training_signals

DATA_KEPT = 2000
"""Data of a project on one base model whose signals are kept, the last ones."""
SIGNALS_SECONDS = 30 * 86400.0
"""How long signals are kept, as long as withheld texts."""
SLACK = 2.0
"""How many times `DATA_KEPT` there may be before the oldest are deleted: not at every request."""


@dataclass(frozen=True, slots=True)
class DataSignals:
    """The signals of one request's data, `data` by datum. `reported` are (scope, finding, severity) of its events."""

    session_id: str
    data: Sequence[Mapping[str, Any]]
    reported: Sequence[Sequence[str]] = ()


def signals_of(database: Database, project_id: str, base_model: str, session_id: str | None) -> list[DataSignals]:
    """The signals of a project, or of one session in it, oldest first."""
    table = training_signals
    mine = (table.c.project_id == project_id) & (table.c.base_model == base_model)
    if session_id is not None:
        mine &= table.c.session_id == session_id
    query = select(table.c.session_id, table.c.signals, table.c.reported).where(mine).order_by(table.c.seq)
    with database.read() as connection:
        return [DataSignals(*row) for row in connection.execute(query).all()]


def add_signals_in(connection: Connection, project_id: str, base_model: str, found: DataSignals, now: float) -> None:
    """Keep the signals of one request, in a transaction; beyond `DATA_KEPT` data the oldest requests' are deleted."""
    table = training_signals
    connection.execute(
        insert(table).values(
            project_id=project_id,
            base_model=base_model,
            session_id=found.session_id,
            data=len(found.data),
            signals=list(found.data),
            reported=list(found.reported),
            created_at=now,
        )
    )
    mine = (table.c.project_id == project_id) & (table.c.base_model == base_model)
    newest = connection.execute(select(table.c.seq, table.c.data).where(mine).order_by(table.c.seq.desc())).all()
    if sum(row.data for row in newest) <= SLACK * DATA_KEPT:
        return
    kept = 0
    for row in newest:
        kept += row.data
        if kept > DATA_KEPT:
            # A request that is larger than all that is kept stays by itself.
            oldest = row.seq if row.seq != newest[0].seq else row.seq - 1
            connection.execute(delete(table).where(mine, table.c.seq <= oldest))
            return


def sweep_signals_in(connection: Connection, now: float) -> None:
    """Delete signals that were kept long enough."""
    connection.execute(delete(training_signals).where(training_signals.c.created_at < now - SIGNALS_SECONDS))


def count_in(connection: Connection, model_id: str, more: Mapping[str, Any]) -> None:
    """Add numbers to a model's account, in a transaction: those of nested keys to theirs, texts replace texts."""
    mine = training_models.c.id == model_id
    account = connection.execute(select(training_models.c.account).where(mine)).scalar()
    connection.execute(update(training_models).where(mine).values(account=_sum(account or {}, more)))


def _sum(account: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    total = dict(account)
    for name, value in more.items():
        if isinstance(value, Mapping):
            total[name] = _sum(total.get(name, {}), value)
        else:
            total[name] = value if isinstance(value, str) else total.get(name, 0) + value
    return total
