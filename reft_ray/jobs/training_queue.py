"""Requests of the training API as a log in SQL: accepted in one transaction, executed in order by one worker.

A request is acknowledged once its row is committed, payload included. The worker of a base model holds a lease, and
whatever it records is in a transaction that checks the lease. A model's requests run in the order of their numbers;
those after the last saved state (`TrainingModel.saved`) keep their payloads, so that a new worker can run them again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, delete, func, insert, or_, select, update

from reft_ray.jobs import ids
from reft_ray.jobs.errors import InvalidError, LeaseLostError, NotFoundError, QuotaError
from reft_ray.jobs.training import TrainingStore
from reft_ray.jobs.training_records import ACTIVE, FAILED, WORKER, TrainingModel, columns
from reft_ray.jobs.training_signals import DataSignals, add_signals_in, count_in, signals_of, sweep_signals_in
from reft_ray.jobs.training_tables import (
    training_checkpoints,
    training_events,
    training_models,
    training_requests,
    training_scores,
    training_workers,
)

QUEUED, DONE, ENDED_BADLY = "queued", "done", "failed"
LEASE_SECONDS = 15.0
RESULT_SECONDS = 3600.0
"""How long a result is kept for its client."""

SCORES_KEPT = 4000
MAX_QUEUED = 256
"""Requests of one project that may wait."""

CHANGING = ("forward_backward", "optim_step", "load_weights")
"""Kinds of requests after which the model is another one: they are run again after a restart."""
UNORDERED = ("sample", "gate")


@dataclass(frozen=True, slots=True)
class TrainingRequest:
    """One request. `target` is the model, the sampler or the checkpoint that it is for."""

    id: str
    target: str
    number: int
    kind: str
    project_id: str
    base_model: str
    status: str
    verdicts: Mapping[str, Any] | None
    binary: bool
    error: str | None
    created_at: float
    finished_at: float | None
    payload: bytes = b""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a request, or the error that ended it: the client's mistake unless `server`."""

    result: bytes = b""
    binary: bool = False
    error: str | None = None
    server: bool = False


Extra = Callable[[Connection], object]
_COLUMNS = columns(training_requests, TrainingRequest)[:-1]


class TrainingQueue:
    """Submit, poll and work on requests."""

    def __init__(self, store: TrainingStore) -> None:
        self.store = store
        self.database = store.database

    def submit(
        self,
        target: str,
        number: int,
        kind: str,
        project_id: str,
        base_model: str,
        payload: bytes,
        extra: Extra | None = None,
        outcome: Outcome | None = None,
    ) -> TrainingRequest:
        """Accept a request; the same one again is accepted once. With an `outcome` it has ended already.

        `extra` runs in the transaction. Raises InvalidError for another request of this number, QuotaError for too
        many that wait.
        """
        digest = hashlib.sha256(kind.encode() + b"\0" + payload).hexdigest()
        now = self.database.now()
        with self.database.write() as connection:
            self.database.serialize(connection, "training")
            row = connection.execute(
                select(training_requests.c.digest, *_COLUMNS).where(
                    training_requests.c.target == target, training_requests.c.number == number
                )
            ).first()
            if row is not None:
                if row.digest != digest:
                    raise InvalidError(f"seq_id: request {number} of {target} was another one", "seq_id")
                return TrainingRequest(*row[1:])
            mine = (training_requests.c.project_id == project_id) & (training_requests.c.status == QUEUED)
            if connection.execute(select(func.count()).where(mine)).scalar_one() >= MAX_QUEUED:
                raise QuotaError(f"{MAX_QUEUED} training requests of this project wait; await their results.", "jobs")
            if extra is not None:
                extra(connection)
            more = {"payload": payload} if outcome is None else _ended(outcome, now)
            request_id = self.enqueue_in(
                connection, target, number, kind, project_id, base_model, digest=digest, created_at=now, **more
            )
            if kind not in UNORDERED:
                connection.execute(update(training_models).where(training_models.c.id == target).values(used_at=now))
                _pass_ended(connection, target)
        return self.get(request_id, project_id)

    def enqueue_in(
        self, connection: Connection, target: str, number: int, kind: str, project_id: str, base_model: str, **more: Any
    ) -> str:
        """Log a request in a transaction, with `more` of its columns; its id. Without them it is the worker's own."""
        values = {
            "id": ids.new_id(ids.TRAINING_REQUEST),
            "target": target,
            "number": number,
            "kind": kind,
            "project_id": project_id,
            "base_model": base_model,
            "digest": "",
            "status": QUEUED,
            "binary": False,
            "created_at": self.database.now(),
            **more,
        }
        connection.execute(insert(training_requests).values(values))
        return str(values["id"])

    def get(self, request_id: str, project_id: str) -> TrainingRequest:
        """A request without its payload. Raises NotFoundError."""
        query = select(*_COLUMNS).where(
            training_requests.c.id == request_id, training_requests.c.project_id == project_id
        )
        with self.database.read() as connection:
            row = connection.execute(query).first()
        if row is None:
            raise NotFoundError("request", request_id[:64])
        return TrainingRequest(*row)

    def result(self, request_id: str) -> bytes:
        """The result of a request that is done. Raises NotFoundError once it is not kept any more."""
        query = select(training_requests.c.result).where(training_requests.c.id == request_id)
        with self.database.read() as connection:
            found: bytes | None = connection.execute(query).scalar()
        if found is None:
            raise NotFoundError("result of the request", request_id)
        return found

    def acquire(self, base_model: str, owner: str, facts: Mapping[str, Any]) -> bool:
        """Become, or stay, the worker of a base model; False while another one holds it."""
        now, table = self.database.now(), training_workers
        values = {"owner": owner, "until": now + LEASE_SECONDS, "facts": dict(facts)}
        with self.database.write() as connection:
            self.database.serialize(connection, "training workers")
            held = connection.execute(select(table.c.owner, table.c.until).where(table.c.base_model == base_model))
            row = held.first()
            if row is None:
                connection.execute(insert(table).values(base_model=base_model, **values))
                return True
            if row.owner != owner and row.until > now:
                return False
            connection.execute(update(table).where(table.c.base_model == base_model).values(values))
        return True

    def release(self, base_model: str, owner: str) -> None:
        """Give the lease back."""
        mine = (training_workers.c.base_model == base_model) & (training_workers.c.owner == owner)
        with self.database.write() as connection:
            connection.execute(update(training_workers).where(mine).values(until=0.0))

    def runnable(self, base_model: str, limit: int = 256) -> list[TrainingRequest]:
        """Requests that may run now, without payloads, oldest first: the next of each model, and all unordered ones."""
        requests, models = training_requests.c, training_models.c
        query = (
            select(*_COLUMNS)
            .outerjoin(training_models, requests.target == models.id)
            .where(requests.status == QUEUED, requests.base_model == base_model)
            .where(
                or_(requests.kind.in_(UNORDERED), (requests.number == models.applied + 1) & (models.state == ACTIVE))
            )
        )
        with self.database.read() as connection:
            rows = connection.execute(query.order_by(requests.seq).limit(limit)).all()
        return [TrainingRequest(*row) for row in rows]

    def loaded(self, request: TrainingRequest) -> TrainingRequest:
        """The request with its payload."""
        query = select(training_requests.c.payload).where(training_requests.c.id == request.id)
        with self.database.read() as connection:
            return replace(request, payload=connection.execute(query).scalar() or b"")

    def unsaved(self, model: TrainingModel) -> list[TrainingRequest]:
        """The requests with an effect between a model's saved state and what it has applied, in order."""
        requests = training_requests.c
        query = select(*[*_COLUMNS, requests.payload]).where(
            requests.target == model.id,
            requests.number > model.saved,
            requests.number <= model.applied,
            requests.status == DONE,
            requests.kind.in_(CHANGING),
        )
        with self.database.read() as connection:
            rows = connection.execute(query.order_by(requests.number)).all()
        return [TrainingRequest(*row) for row in rows]

    def scores(self, project_id: str, base_model: str) -> list[float]:
        """The last scores of a project's data, over all its sessions."""
        mine = (training_scores.c.project_id == project_id) & (training_scores.c.base_model == base_model)
        with self.database.read() as connection:
            return list(connection.execute(select(training_scores.c.scores).where(mine)).scalar() or ())

    def signals(self, project_id: str, base_model: str, session_id: str | None) -> list[DataSignals]:
        """The signals of a project's last data, or of those of one session, oldest first."""
        return signals_of(self.database, project_id, base_model, session_id)

    def judged(
        self,
        request: TrainingRequest,
        owner: str,
        verdicts: Mapping[str, Any],
        scores: Sequence[float],
        events: Sequence[tuple[str, Mapping[str, Any]]],
        account: Mapping[str, Any] | None = None,
        signals: DataSignals | None = None,
    ) -> None:
        """Record the verdicts on a request's data before any gradient: a run after a restart follows the same.

        With what they add to the model's account, and the signals for the findings.
        """
        table = training_scores
        with self._leased(request.base_model, owner) as connection:
            changed = connection.execute(
                update(training_requests)
                .where(training_requests.c.id == request.id, training_requests.c.verdicts.is_(None))
                .values(verdicts=dict(verdicts))
            ).rowcount
            if not changed:
                return
            mine = (table.c.project_id == request.project_id) & (table.c.base_model == request.base_model)
            earlier = connection.execute(select(table.c.scores).where(mine)).scalar()
            kept = [*(earlier or ()), *scores][-SCORES_KEPT:]
            if earlier is None:
                row = {"project_id": request.project_id, "base_model": request.base_model, "scores": kept}
                connection.execute(insert(table).values(row))
            else:
                connection.execute(update(table).where(mine).values(scores=kept))
            if signals is not None:
                add_signals_in(connection, request.project_id, request.base_model, signals, self.database.now())
            count_in(connection, request.target, account or {})
            for place, (kind, data) in enumerate(events):
                event_id = ids.derived_id(ids.TRAINING_EVENT, request.id, str(place))
                self._event_in(connection, event_id, request.target, request.number, kind, data)

    def end(self, request: TrainingRequest, owner: str, outcome: Outcome, extra: Extra | None = None) -> None:
        """Record the outcome of a request; an ordered one is applied with it. Raises LeaseLostError."""
        now, model = self.database.now(), training_models
        with self._leased(request.base_model, owner) as connection:
            connection.execute(
                update(training_requests).where(training_requests.c.id == request.id).values(_ended(outcome, now))
            )
            if request.kind not in UNORDERED:
                connection.execute(
                    update(model).where(model.c.id == request.target).values(applied=request.number, used_at=now)
                )
                _pass_ended(connection, request.target)
            if request.kind == "optim_step" and outcome.error is None:
                count_in(connection, request.target, {"steps": 1})
            if extra is not None and outcome.error is None:
                extra(connection)

    def saved(self, model: TrainingModel, owner: str, number: int, key: str) -> None:
        """Record a saved state with the effect of all requests up to `number`; their payloads are not needed now."""
        requests = training_requests
        with self._leased(model.base_model, owner) as connection:
            connection.execute(
                update(training_models).where(training_models.c.id == model.id).values(saved=number, state_key=key)
            )
            old = (requests.c.target == model.id) & (requests.c.number <= number)
            connection.execute(update(requests).where(old).values(payload=None))

    def fail_model(self, request: TrainingRequest, owner: str, reason: str) -> None:
        """End a model's training: this request and all that wait fail for this reason."""
        now, requests = self.database.now(), training_requests
        with self._leased(request.base_model, owner) as connection:
            connection.execute(
                update(requests)
                .where(requests.c.target == request.target, requests.c.status == QUEUED)
                .values(_ended(Outcome(error=reason), now))
            )
            connection.execute(
                update(training_models).where(training_models.c.id == request.target).values(state=FAILED)
            )
            event_id = ids.derived_id(ids.TRAINING_EVENT, request.id, "failed")
            self._event_in(connection, event_id, request.target, request.number, "model.failed", {"reason": reason})

    def gated(self, checkpoint_id: str, base_model: str, owner: str, gate: str, checks: Sequence[str]) -> None:
        """Record the outcome of a release gate, also in the audit log."""
        table = training_checkpoints
        with self._leased(base_model, owner) as connection:
            mine = table.c.id == checkpoint_id
            project = connection.execute(select(table.c.project_id).where(mine)).scalar()
            connection.execute(update(table).where(mine).values(gate=gate, checks=list(checks)))
            data = {"id": checkpoint_id, "gate": gate}
            self.store.audit.append_in(connection, "training_checkpoint.gated", WORKER, project, data)

    def close_waiting(self, base_model: str, owner: str) -> None:
        """Fail the requests of models that are not trained any more."""
        requests = training_requests
        with self._leased(base_model, owner) as connection:
            ended = select(training_models.c.id).where(training_models.c.state != ACTIVE)
            connection.execute(
                update(requests)
                .where(requests.c.status == QUEUED, requests.c.base_model == base_model)
                .where(requests.c.kind.not_in(UNORDERED), requests.c.target.in_(ended))
                .values(_ended(Outcome(error="the model is not trained any more"), self.database.now()))
            )

    def sweep(self) -> None:
        """Forget results that were kept long enough, but no payload that a restart may need."""
        before = self.database.now() - RESULT_SECONDS
        requests = training_requests
        with self.database.write() as connection:
            old = (requests.c.finished_at < before) & requests.c.result.is_not(None)
            connection.execute(update(requests).where(old).values(result=None))
            connection.execute(delete(requests).where(requests.c.finished_at < before, requests.c.kind.in_(UNORDERED)))
            sweep_signals_in(connection, self.database.now())

    @contextmanager
    def _leased(self, base_model: str, owner: str) -> Iterator[Connection]:
        """A write transaction of the worker that holds the lease. Raises LeaseLostError for any other."""
        with self.database.write() as connection:
            query = select(training_workers.c.owner).where(training_workers.c.base_model == base_model)
            if connection.execute(query).scalar() != owner:
                raise LeaseLostError(f"another worker trains on {base_model}")
            yield connection

    def _event_in(
        self, connection: Connection, event_id: str, model: str, number: int, kind: str, data: Mapping[str, Any]
    ) -> None:
        connection.execute(
            insert(training_events).values(
                id=event_id, model_id=model, number=number, type=kind, data=dict(data), created_at=self.database.now()
            )
        )


def _pass_ended(connection: Connection, model_id: str) -> None:
    """Let a model's next request run where the ones before it were refused when they came."""
    mine = training_models.c.id == model_id
    applied = connection.execute(select(training_models.c.applied).where(mine)).scalar()
    while applied is not None:
        following = (training_requests.c.target == model_id) & (training_requests.c.number == applied + 1)
        if connection.execute(select(training_requests.c.status).where(following)).scalar() in (None, QUEUED):
            break
        applied += 1
        connection.execute(update(training_models).where(mine).values(applied=applied))


def _ended(outcome: Outcome, now: float) -> dict[str, Any]:
    category = "server" if outcome.server else "user"
    return {
        "status": DONE if outcome.error is None else ENDED_BADLY,
        "result": outcome.result if outcome.error is None else None,
        "binary": outcome.binary,
        "error": None if outcome.error is None else f"{category}:{outcome.error}",
        "finished_at": now,
    }
