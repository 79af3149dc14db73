"""Saved weights of the training API: to continue from, to sample from, and to download once the gate has passed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from reft_ray.api.training_schema import Save, SaveExternal, SaveForSampler
from reft_ray.core.errors import ReftError
from reft_ray.jobs.errors import InvalidError, NotFoundError
from reft_ray.jobs.training_queue import Extra, Outcome, TrainingQueue, TrainingRequest
from reft_ray.jobs.training_records import (
    PASSED,
    PENDING,
    UNGATED,
    Kind,
    TrainingCheckpoint,
    TrainingModel,
    checkpoint_path,
)
from reft_ray.pipeline.training_engine import TrainingEngine


class Saves:
    """Saves models of an engine. Each method returns the outcome, and what is recorded in its transaction."""

    def __init__(self, engine: TrainingEngine, queue: TrainingQueue) -> None:
        self._engine, self._queue = engine, queue

    def save(self, request: TrainingRequest, wanted: Save) -> tuple[Outcome, Extra]:
        """Weights and optimiser, to continue from."""
        name = wanted.path or f"request-{request.number}"
        model = self._queue.store.model(request.target, None)
        if not wanted.overwrite:
            self._check_new(model, "weights", name)
        elif (earlier := self._earlier(model, "weights", name)) is not None:
            self._engine.replaced.append(earlier.key)
        checkpoint = self._stored(request, model, "weights", name, wanted, whole=True)
        return as_json({"type": "save_weights", "path": checkpoint.id}), self._recorded(checkpoint)

    def save_for_sampler(self, request: TrainingRequest, wanted: SaveForSampler) -> tuple[Outcome, Extra]:
        """Weights to sample from: with a name they are gated, without one they are their session's alone."""
        model = self._queue.store.model(request.target, None)
        kind: Kind = "sampler_weights"
        if wanted.path is not None:
            self._check_new(model, kind, wanted.path)
            checkpoint = self._stored(request, model, kind, wanted.path, wanted, gate=PENDING)
            record, project, base = self._recorded(checkpoint), request.project_id, request.base_model

            def recorded(connection: Any) -> None:
                record(connection)
                self._queue.enqueue_in(connection, checkpoint.id, request.number, "gate", project, base)

            return as_json({"type": "save_weights_for_sampler", "path": checkpoint.id}), recorded
        checkpoint = self._stored(request, model, kind, f"unnamed-{request.number}", wanted, ephemeral=True)
        number = wanted.sampling_session_seq_id or 0
        sampler = f"{model.session_id}:sample:{number}"
        record = self._recorded(checkpoint)

        def with_sampler(connection: Any) -> None:
            record(connection)
            self._queue.store.add_sampler_in(
                connection, model.session_id, model.project_id, number, model.base_model, checkpoint.id
            )

        return as_json({"type": "save_weights_for_sampler", "sampling_session_id": sampler}), with_sampler

    def save_external(self, request: TrainingRequest, wanted: SaveExternal) -> tuple[Outcome, Extra]:
        """Weights that leave: the gate comes first, and what it refuses is not stored."""
        model = self._queue.store.model(request.target, None)
        kind: Kind = "external_weights"
        self._check_new(model, kind, wanted.path)
        result = self._engine.parts.gate.check(self._engine.slot(model))
        if not result.passed:
            failures = "; ".join(map(str, result.failures))
            raise ReftError(f"the release gate refuses these weights: {failures}")
        checkpoint = self._stored(request, model, kind, wanted.path, wanted, gate=PASSED)
        checkpoint = replace(checkpoint, checks=tuple(map(str, result.checks)))
        return as_json({"type": "save_weights_external", "path": checkpoint.id}), self._recorded(checkpoint)

    def _stored(
        self,
        request: TrainingRequest,
        model: TrainingModel,
        kind: Kind,
        name: str,
        wanted: Any,
        whole: bool = False,
        ephemeral: bool = False,
        gate: str = UNGATED,
    ) -> TrainingCheckpoint:
        """Write a model's weights. Their folder has the request's number, so that what is replaced stays whole."""
        key = f"{model.folder}/{kind}-{request.number}"
        size = self._engine.save(model, key, whole)
        now, ttl = self._queue.database.now(), wanted.ttl_seconds
        return TrainingCheckpoint(
            id=checkpoint_path(model.id, kind, name),
            model_id=model.id,
            session_id=model.session_id,
            project_id=model.project_id,
            kind=kind,
            name=name,
            key=key,
            bytes=size,
            metadata=dict(getattr(wanted, "user_metadata", None) or {}),
            ephemeral=ephemeral,
            gate=gate,
            checks=(),
            created_at=now,
            expires_at=None if ttl is None else now + ttl,
        )

    def _recorded(self, checkpoint: TrainingCheckpoint) -> Extra:
        return lambda connection: self._queue.store.add_checkpoint_in(connection, checkpoint)

    def _check_new(self, model: TrainingModel, kind: Kind, name: str) -> None:
        if self._earlier(model, kind, name) is not None:
            path = checkpoint_path(model.id, kind, name)
            raise InvalidError(f"{path} exists already: choose another name, or delete it first", "path")

    def _earlier(self, model: TrainingModel, kind: Kind, name: str) -> TrainingCheckpoint | None:
        try:
            return self._queue.store.checkpoint(checkpoint_path(model.id, kind, name), model.project_id)
        except NotFoundError:
            return None


def as_json(result: Mapping[str, Any]) -> Outcome:
    """A result in JSON."""
    return Outcome(json.dumps(result).encode())
