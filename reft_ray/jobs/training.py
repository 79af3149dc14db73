"""The store of the training API: sessions of a client, their models, checkpoints, samplers and events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from sqlalchemy import Connection, Select, Table, delete, func, insert, select, update

from reft_ray.jobs import ids
from reft_ray.jobs.audit import AuditLog
from reft_ray.jobs.database import Database
from reft_ray.jobs.errors import InvalidError, NotFoundError, QuotaError
from reft_ray.jobs.tenants import Principal
from reft_ray.jobs.training_records import (
    ACTIVE,
    UNLOADED,
    WORKER,
    Sampler,
    TrainingCheckpoint,
    TrainingEvent,
    TrainingModel,
    TrainingSession,
    columns,
)
from reft_ray.jobs.training_tables import (
    training_checkpoints,
    training_events,
    training_models,
    training_samplers,
    training_sessions,
    training_workers,
)

T = TypeVar("T")
SESSION_SECONDS = 86400.0
"""A session that was not seen for so long has ended."""
ABSENT_SECONDS = 600.0
"""The models of a session that was not seen for so long do not count: clients send a heartbeat every ten seconds."""
ABSENT_FACTOR = 4
"""Of those and the others together a project has at most this multiple of its limit: each has a saved state."""

EPHEMERAL_KEPT = 8
"""Samplers without a name that a model keeps: a loop may use those of a few steps ago."""


class TrainingStore:
    """Sessions and what belongs to them. Objects of another project are NotFoundError."""

    def __init__(self, database: Database, max_project_bytes: int, max_models: int) -> None:
        self.database = database
        self.max_project_bytes = max_project_bytes
        self.max_models = max_models
        self.audit = AuditLog(database)

    def open_session(self, caller: Principal, metadata: Mapping[str, Any], display_name: str | None) -> TrainingSession:
        """A new session."""
        now = self.database.now()
        session = TrainingSession(
            ids.new_id(ids.TRAINING_SESSION), caller.organization_id, caller.project_id, dict(metadata), display_name,
            now, now, None,
        )  # fmt: skip
        with self.database.write() as connection:
            connection.execute(insert(training_sessions).values(_values(session)))
            data = {"id": session.id}
            self.audit.append_in(connection, "training_session.created", caller.actor, caller.project_id, data)
        return session

    def session(self, session_id: str, project_id: str | None) -> TrainingSession:
        """Get a session; with None of any project. Raises NotFoundError."""
        return self._one(training_sessions, TrainingSession, "training session", session_id, project_id)

    def sessions(self, project_id: str, limit: int, offset: int) -> list[TrainingSession]:
        """Sessions, newest first."""
        return self._page(training_sessions, TrainingSession, project_id, limit, offset)[0]

    def recent(
        self, project_id: str | None, after: str | None = None, limit: int = 50
    ) -> tuple[list[TrainingSession], bool]:
        """Sessions of a project or of all, newest first, those older than `after`; and whether there are more."""
        table = training_sessions
        query = select(*columns(table, TrainingSession)).order_by(table.c.seq.desc()).limit(limit + 1)
        if project_id is not None:
            query = query.where(table.c.project_id == project_id)
        if after is not None:
            query = query.where(table.c.seq < select(table.c.seq).where(table.c.id == after).scalar_subquery())
        with self.database.read() as connection:
            rows = connection.execute(query).all()
        return [TrainingSession(*row) for row in rows[:limit]], len(rows) > limit

    def models_in(self, session_ids: Sequence[str]) -> list[TrainingModel]:
        """The models of sessions, in their order."""
        table = training_models
        query = select(*columns(table, TrainingModel)).where(table.c.session_id.in_(session_ids))
        with self.database.read() as connection:
            return [TrainingModel(*row) for row in connection.execute(query.order_by(table.c.seq)).all()]

    def checkpoints_in(self, session_ids: Sequence[str]) -> list[TrainingCheckpoint]:
        """The named checkpoints of sessions, newest first."""
        table = training_checkpoints
        query = select(*columns(table, TrainingCheckpoint)).where(
            table.c.session_id.in_(session_ids), table.c.ephemeral.is_(False)
        )
        with self.database.read() as connection:
            return [TrainingCheckpoint(*row) for row in connection.execute(query.order_by(table.c.seq.desc())).all()]

    def latest_events(self, model_ids: Sequence[str], limit: int = 100) -> list[TrainingEvent]:
        """The last events of models, newest first."""
        table = training_events
        query = select(*columns(table, TrainingEvent)).where(table.c.model_id.in_(model_ids))
        with self.database.read() as connection:
            rows = connection.execute(query.order_by(table.c.seq.desc()).limit(limit)).all()
        return [TrainingEvent(*row) for row in rows]

    def seen(self, session_id: str, project_id: str) -> TrainingSession:
        """Record a heartbeat."""
        with self.database.write() as connection:
            mine = (training_sessions.c.id == session_id) & (training_sessions.c.project_id == project_id)
            connection.execute(update(training_sessions).where(mine).values(seen_at=self.database.now()))
        return self.session(session_id, project_id)

    def finish(self, session_id: str, project_id: str) -> None:
        """End a session; its models are not trained any more."""
        session = self.session(session_id, project_id)
        with self.database.write() as connection:
            connection.execute(
                update(training_sessions).where(training_sessions.c.id == session.id).values(
                    finished_at=self.database.now())
            )  # fmt: skip
            connection.execute(
                update(training_models)
                .where(training_models.c.session_id == session.id, training_models.c.state == ACTIVE)
                .values(state=UNLOADED)
            )

    def create_model_in(
        self,
        connection: Connection,
        session: TrainingSession,
        number: int,
        base_model: str,
        lora: Mapping[str, Any],
        metadata: Mapping[str, Any],
        actor: Mapping[str, Any],
        applied: int,
    ) -> TrainingModel:
        """The model of this number in its session; the same one if it is asked for again. Raises InvalidError."""
        model_id = f"{session.id}:train:{number}"
        found = connection.execute(
            select(*columns(training_models, TrainingModel)).where(training_models.c.id == model_id)
        ).first()
        if found is not None:
            return TrainingModel(*found)
        now = self.database.now()
        present = select(training_sessions.c.id).where(training_sessions.c.seen_at >= now - ABSENT_SECONDS)
        mine = (training_models.c.project_id == session.project_id) & (training_models.c.state == ACTIVE)
        counted = connection.execute(select(training_models.c.session_id.in_(present)).where(mine)).scalars().all()
        if sum(counted) >= self.max_models or len(counted) >= ABSENT_FACTOR * self.max_models:
            # Not a quota error: the client would repeat its request for minutes.
            raise InvalidError(
                f"The project has {self.max_models} models in training; finish their sessions or unload them.",
                "model_seq_id",
                "insufficient_quota",
            )
        model = TrainingModel(
            model_id, session.id, session.project_id, base_model, dict(lora), dict(metadata), ACTIVE, applied, applied,
            None, now, now, {},
        )  # fmt: skip
        connection.execute(insert(training_models).values(_values(model)))
        self.audit.append_in(connection, "training_model.created", actor, session.project_id, {"id": model_id})
        return model

    def model(self, model_id: str, project_id: str | None) -> TrainingModel:
        """Get a model; with None of any project. Raises NotFoundError."""
        return self._one(training_models, TrainingModel, "model", model_id, project_id)

    def models(self, project_id: str, limit: int, offset: int) -> tuple[list[TrainingModel], int]:
        """Models, newest first, and how many there are."""
        return self._page(training_models, TrainingModel, project_id, limit, offset)

    def models_of(self, session_id: str) -> list[str]:
        """The ids of a session's models."""
        with self.database.read() as connection:
            query = select(training_models.c.id).where(training_models.c.session_id == session_id)
            return list(connection.execute(query.order_by(training_models.c.seq)).scalars())

    def set_state(self, model_id: str, state: str) -> None:
        """End a model's training."""
        with self.database.write() as connection:
            connection.execute(update(training_models).where(training_models.c.id == model_id).values(state=state))

    def add_sampler(self, session: TrainingSession, number: int, base_model: str, checkpoint_id: str | None) -> Sampler:
        """The sampler of this number in its session."""
        with self.database.write() as connection:
            return self.add_sampler_in(connection, session.id, session.project_id, number, base_model, checkpoint_id)

    def add_sampler_in(
        self, connection: Connection, session: str, project: str, number: int, base_model: str, checkpoint: str | None
    ) -> Sampler:
        """`add_sampler`, in a transaction."""
        sampler = Sampler(
            f"{session}:sample:{number}", session, project, base_model, checkpoint, 1, self.database.now()
        )
        found = connection.execute(
            select(*columns(training_samplers, Sampler)).where(training_samplers.c.id == sampler.id)
        ).first()
        if found is None:
            connection.execute(insert(training_samplers).values(_values(sampler)))
            return sampler
        known = Sampler(*found)
        if known.checkpoint_id != checkpoint:
            raise InvalidError(f"{sampler.id} exists already, with other weights", "sampling_session_seq_id")
        return known

    def sampler(self, sampler_id: str, project_id: str | None) -> Sampler:
        """Get a sampler. Raises NotFoundError."""
        return self._one(training_samplers, Sampler, "sampling session", sampler_id, project_id)

    def samplers_of(self, session_id: str) -> list[str]:
        """The ids of a session's samplers."""
        with self.database.read() as connection:
            query = select(training_samplers.c.id).where(training_samplers.c.session_id == session_id)
            return list(connection.execute(query.order_by(training_samplers.c.seq)).scalars())

    def join_sampler(self, sampler_id: str, project_id: str) -> int:
        """The number of one more client of a sampler."""
        self.sampler(sampler_id, project_id)
        mine = training_samplers.c.id == sampler_id
        with self.database.write() as connection:
            connection.execute(update(training_samplers).where(mine).values(clients=training_samplers.c.clients + 1))
            return int(connection.execute(select(training_samplers.c.clients).where(mine)).scalar_one()) - 1

    def add_checkpoint_in(self, connection: Connection, checkpoint: TrainingCheckpoint) -> None:
        """Record saved weights, in place of those of the same name. Raises QuotaError above the project's bytes."""
        table = training_checkpoints
        connection.execute(delete(table).where(table.c.id == checkpoint.id))
        stored = select(func.coalesce(func.sum(table.c.bytes), 0)).where(table.c.project_id == checkpoint.project_id)
        left = self.max_project_bytes - int(connection.execute(stored).scalar_one())
        if checkpoint.bytes > left:
            raise QuotaError(f"The project's quota has {left} bytes left for weights; delete checkpoints.", "bytes")
        connection.execute(insert(table).values(_values(checkpoint)))
        if not checkpoint.ephemeral:
            data = {"id": checkpoint.id}
            self.audit.append_in(connection, "training_checkpoint.created", WORKER, checkpoint.project_id, data)

    def checkpoint(self, path: str, project_id: str | None) -> TrainingCheckpoint:
        """Get a checkpoint by its path. Raises NotFoundError, also once it has expired."""
        found = self._one(training_checkpoints, TrainingCheckpoint, "checkpoint", path, project_id)
        if found.expires_at is not None and found.expires_at <= self.database.now():
            raise NotFoundError("checkpoint", path)
        return found

    def checkpoints(self, project_id: str, model_id: str | None = None) -> list[TrainingCheckpoint]:
        """Named checkpoints of a project or of one model, newest first."""
        query = select(*columns(training_checkpoints, TrainingCheckpoint)).where(
            training_checkpoints.c.project_id == project_id, training_checkpoints.c.ephemeral.is_(False)
        )
        if model_id is not None:
            query = query.where(training_checkpoints.c.model_id == model_id)
        with self.database.read() as connection:
            rows = connection.execute(query.order_by(training_checkpoints.c.seq.desc())).all()
        now = self.database.now()
        found = [TrainingCheckpoint(*row) for row in rows]
        return [item for item in found if item.expires_at is None or item.expires_at > now]

    def delete_checkpoint(self, path: str, project_id: str, actor: Mapping[str, Any]) -> TrainingCheckpoint:
        """Forget a checkpoint; its files are the caller's to remove."""
        found = self.checkpoint(path, project_id)
        with self.database.write() as connection:
            connection.execute(delete(training_checkpoints).where(training_checkpoints.c.id == path))
            self.audit.append_in(connection, "training_checkpoint.deleted", actor, project_id, {"id": path})
        return found

    def expire(self, path: str, expires_at: float | None) -> None:
        """Set when a checkpoint expires; None for never."""
        with self.database.write() as connection:
            mine = training_checkpoints.c.id == path
            connection.execute(update(training_checkpoints).where(mine).values(expires_at=expires_at))

    def expired(self) -> list[TrainingCheckpoint]:
        """Remove the records of expired checkpoints and of all but the last unnamed ones; those removed."""
        table, now = training_checkpoints, self.database.now()
        with self.database.write() as connection:
            old = connection.execute(select(*columns(table, TrainingCheckpoint)).where(table.c.expires_at <= now)).all()
            unnamed = connection.execute(
                select(*columns(table, TrainingCheckpoint)).where(table.c.ephemeral).order_by(table.c.seq.desc())
            ).all()
            gone, kept = [TrainingCheckpoint(*row) for row in old], dict[str, int]()
            for row in unnamed:
                checkpoint = TrainingCheckpoint(*row)
                kept[checkpoint.model_id] = kept.get(checkpoint.model_id, 0) + 1
                if kept[checkpoint.model_id] > EPHEMERAL_KEPT:
                    gone.append(checkpoint)
            connection.execute(delete(table).where(table.c.id.in_([item.id for item in gone])))
        return gone

    def ended(self, base_model: str) -> list[TrainingModel]:
        """Models that are not trained any more and still have a saved state, which is the caller's to remove.

        A session that has not been seen for a day ends.
        """
        now = self.database.now()
        for session in self._stale(now - SESSION_SECONDS):
            self.finish(session.id, session.project_id)
        mine = (training_models.c.base_model == base_model) & (training_models.c.state != ACTIVE)
        mine &= training_models.c.state_key.is_not(None)
        with self.database.write() as connection:
            rows = connection.execute(select(*columns(training_models, TrainingModel)).where(mine)).all()
            connection.execute(update(training_models).where(mine).values(state_key=None))
        return [TrainingModel(*row) for row in rows]

    def _stale(self, before: float) -> list[TrainingSession]:
        query = select(*columns(training_sessions, TrainingSession)).where(
            training_sessions.c.finished_at.is_(None), training_sessions.c.seen_at < before
        )
        with self.database.read() as connection:
            return [TrainingSession(*row) for row in connection.execute(query).all()]

    def events(self, model_id: str, after: int = 0, limit: int = 1000) -> list[tuple[int, TrainingEvent]]:
        """Events of a model with their places, oldest first."""
        query = select(training_events.c.seq, *columns(training_events, TrainingEvent)).where(
            training_events.c.model_id == model_id, training_events.c.seq > after
        )
        with self.database.read() as connection:
            rows = connection.execute(query.order_by(training_events.c.seq).limit(limit)).all()
        return [(row[0], TrainingEvent(*row[1:])) for row in rows]

    def facts(self, base_model: str) -> Mapping[str, Any]:
        """What the worker of a base model says of it: context, vocabulary, tokenizer; empty before its first start."""
        with self.database.read() as connection:
            query = select(training_workers.c.facts).where(training_workers.c.base_model == base_model)
            found: Mapping[str, Any] | None = connection.execute(query).scalar()
        return found or {}

    def _one(self, table: Table, record: type[T], what: str, object_id: str, project_id: str | None) -> T:
        query = select(*columns(table, record)).where(table.c.id == object_id)
        if project_id is not None:
            query = query.where(table.c.project_id == project_id)
        with self.database.read() as connection:
            row = connection.execute(query).first()
        if row is None:
            raise NotFoundError(what, object_id[:320])
        return record(*row)

    def _page(self, table: Table, record: type[T], project_id: str, limit: int, offset: int) -> tuple[list[T], int]:
        query: Select[Any] = select(*columns(table, record)).where(table.c.project_id == project_id)
        with self.database.read() as connection:
            total = connection.execute(select(func.count()).where(table.c.project_id == project_id)).scalar_one()
            rows = connection.execute(query.order_by(table.c.seq.desc()).limit(limit).offset(offset)).all()
        return [record(*row) for row in rows], int(total)


def _values(record: Any) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in fields(record)}
