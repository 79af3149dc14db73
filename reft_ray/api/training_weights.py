"""`/training`: training runs, their events and checkpoints, and the download of released weights."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from itsdangerous import BadSignature, URLSafeTimedSerializer

from reft_ray.api.auth import Caller
from reft_ray.api.errors import ApiError, invalid, not_found
from reft_ray.api.stores import Stores
from reft_ray.api.training import BASE, gated
from reft_ray.api.training_schema import PathRef, TtlUpdate
from reft_ray.jobs.artefacts import files_in
from reft_ray.jobs.database import service_secret
from reft_ray.jobs.errors import NotFoundError
from reft_ray.jobs.training import TrainingStore
from reft_ray.jobs.training_records import FAILED, KINDS, PASSED, TrainingCheckpoint, TrainingModel, checkpoint_path

URL_SECONDS = 3600
DOWNLOADS = "/training-downloads"
"""Outside of `/v1`: the signature in the address is the key."""

_KINDS: Mapping[str, str] = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}
Limit = Annotated[int, Query(ge=1, le=1000)]
Offset = Annotated[int, Query(ge=0)]


def router(stores: Stores, store: TrainingStore) -> APIRouter:
    """The routes under `/v1`."""
    routes = APIRouter(prefix=BASE, tags=["training"])
    signer = _signer(stores)
    files = stores.files.content

    def find(model_id: str, kind: str, name: str, caller: Caller) -> TrainingCheckpoint:
        known = next((each for each in KINDS if each == kind), None)
        if known is None:
            raise NotFoundError("checkpoint", f"{kind[:32]}/{name[:128]}")
        return store.checkpoint(checkpoint_path(model_id, known, name), caller.project_id)

    @routes.get("/training_runs")
    def list_runs(caller: Caller, limit: Limit = 20, offset: Offset = 0) -> dict[str, Any]:
        """The project's models in training."""
        models, total = store.models(caller.project_id, limit, offset)
        runs = [_run(model, store.checkpoints(caller.project_id, model.id)) for model in models]
        return {"training_runs": runs, "cursor": {"offset": offset, "limit": limit, "total_count": total}}

    @routes.get("/training_runs/{model_id}")
    def get_run(model_id: str, caller: Caller) -> dict[str, Any]:
        """A model in training."""
        model = store.model(model_id, caller.project_id)
        return _run(model, store.checkpoints(caller.project_id, model.id))

    @routes.get("/training_runs/{model_id}/events")
    def events(model_id: str, caller: Caller, after: Offset = 0, limit: Limit = 100) -> dict[str, Any]:
        """What was withheld of a model's data, oldest first: the datum's place, score and reason, never its text."""
        model = store.model(model_id, caller.project_id)
        found = store.events(model.id, after, limit)
        return {
            "object": "list",
            "data": [
                {
                    "id": event.id,
                    "type": event.type,
                    "seq_id": event.number,
                    "created_at": event.created_at,
                    **event.data,
                }
                for _, event in found
            ],
            "next": found[-1][0] if len(found) == limit else None,
        }

    @routes.get("/training_runs/{model_id}/checkpoints")
    def list_checkpoints(model_id: str, caller: Caller) -> dict[str, Any]:
        """A model's named checkpoints."""
        model = store.model(model_id, caller.project_id)
        return {"checkpoints": [_checkpoint(item) for item in store.checkpoints(caller.project_id, model.id)]}

    @routes.get("/checkpoints")
    def all_checkpoints(caller: Caller, limit: Limit = 100, offset: Offset = 0) -> dict[str, Any]:
        """The project's named checkpoints."""
        found = store.checkpoints(caller.project_id)
        return {
            "checkpoints": [_checkpoint(item) for item in found[offset : offset + limit]],
            "cursor": {"offset": offset, "limit": limit, "total_count": len(found)},
        }

    @routes.delete("/training_runs/{model_id}/checkpoints/{kind}/{name}")
    def delete_checkpoint(model_id: str, kind: str, name: str, caller: Caller) -> dict[str, Any]:
        """Delete a checkpoint and its files."""
        checkpoint = find(model_id, kind, name, caller)
        store.delete_checkpoint(checkpoint.id, caller.project_id, caller.actor)
        files.delete_tree(checkpoint.key)
        return {}

    @routes.put("/training_runs/{model_id}/checkpoints/{kind}/{name}/ttl")
    def set_ttl(model_id: str, kind: str, name: str, body: TtlUpdate, caller: Caller) -> dict[str, Any]:
        """Set when a checkpoint expires."""
        checkpoint = find(model_id, kind, name, caller)
        expires = None if body.ttl_seconds is None else stores.database.now() + body.ttl_seconds
        store.expire(checkpoint.id, expires)
        return {}

    @routes.get("/training_runs/{model_id}/checkpoints/{kind}/{name}/external_weights_urls")
    def urls(model_id: str, kind: str, name: str, caller: Caller, request: Request) -> dict[str, Any]:
        """An address for each file of released weights; each is good for an hour."""
        checkpoint = find(model_id, kind, name, caller)
        if checkpoint.kind != "external_weights":
            raise invalid(
                "Only external_weights are downloaded: save them with save_weights_external.", "checkpoint_id"
            )
        if checkpoint.gate != PASSED:
            raise gated(checkpoint.id, checkpoint.gate, checkpoint.checks)
        root = str(request.base_url).rstrip("/")
        names = files_in(files.uri(checkpoint.key))
        return {
            "urls": {file: f"{root}{DOWNLOADS}/{signer.dumps([checkpoint.id, file])}" for file in names},
            "expires": _time(stores.database.now() + URL_SECONDS),
        }

    @routes.post("/weights_info")
    def weights_info(body: PathRef, caller: Caller) -> dict[str, Any]:
        """What a new model needs to load these weights."""
        model = store.model(store.checkpoint(body.tinker_path, caller.project_id).model_id, caller.project_id)
        return {
            "base_model": model.base_model,
            "is_lora": True,
            "lora_rank": model.lora["rank"],
            "optimizer_config": {"type": "adamw"},
            **{name: model.lora[name] for name in ("train_unembed", "train_mlp", "train_attn")},
        }

    @routes.get("/sessions")
    def sessions(caller: Caller, limit: Limit = 20, offset: Offset = 0) -> dict[str, Any]:
        """The project's sessions."""
        return {"sessions": [session.id for session in store.sessions(caller.project_id, limit, offset)]}

    @routes.get("/sessions/{session_id}")
    def session(session_id: str, caller: Caller) -> dict[str, Any]:
        """A session, and what it made."""
        found = store.session(session_id, caller.project_id)
        return {
            "training_run_ids": store.models_of(found.id),
            "sampler_ids": store.samplers_of(found.id),
            "user_metadata": _texts(found.metadata),
            "display_name": found.display_name,
        }

    return routes


def download_router(stores: Stores, store: TrainingStore) -> APIRouter:
    """The route of signed addresses; released weights alone, as long as they are not deleted."""
    routes = APIRouter(tags=["training"])
    signer, files = _signer(stores), stores.files.content

    @routes.get(f"{DOWNLOADS}/{{token}}", response_class=StreamingResponse)
    def download(token: str) -> StreamingResponse:
        """One file of released weights."""
        try:
            path, file = signer.loads(token, max_age=URL_SECONDS)
        except BadSignature:
            raise not_found("This address is not valid any more; ask for a new one.", "token") from None
        checkpoint = store.checkpoint(path, None)
        if checkpoint.gate != PASSED:
            raise ApiError(403, "These weights are not released.", code="gate_not_passed")
        return StreamingResponse(files.read(f"{checkpoint.key}/{file}"), media_type="application/octet-stream")

    return routes


def _signer(stores: Stores) -> URLSafeTimedSerializer:
    return URLSafeTimedSerializer(service_secret(stores.database, "downloads"), salt="training")


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def _texts(metadata: Mapping[str, Any]) -> dict[str, str]:
    return {str(name): value if isinstance(value, str) else str(value) for name, value in metadata.items()}


def _checkpoint(checkpoint: TrainingCheckpoint) -> dict[str, Any]:
    """As the client reads it, with the gate's outcome as our extension."""
    return {
        "checkpoint_id": f"{checkpoint.kind}/{checkpoint.name}",
        "checkpoint_type": _KINDS[checkpoint.kind],
        "time": _time(checkpoint.created_at),
        "tinker_path": checkpoint.id,
        "size_bytes": checkpoint.bytes,
        "public": False,
        "user_metadata": _texts(checkpoint.metadata),
        "expires_at": None if checkpoint.expires_at is None else _time(checkpoint.expires_at),
        "reft": {"gate": checkpoint.gate, "checks": list(checkpoint.checks)},
    }


def _run(model: TrainingModel, checkpoints: list[TrainingCheckpoint]) -> dict[str, Any]:
    last = {kind: next((item for item in checkpoints if item.kind == kind), None) for kind in KINDS}
    training, sampler = last["weights"], last["sampler_weights"]
    return {
        "training_run_id": model.id,
        "base_model": model.base_model,
        "model_owner": model.project_id,
        "is_lora": True,
        "corrupted": model.state == FAILED,
        "lora_rank": model.lora["rank"],
        "last_request_time": _time(model.used_at),
        "last_checkpoint": None if training is None else _checkpoint(training),
        "last_sampler_checkpoint": None if sampler is None else _checkpoint(sampler),
        "user_metadata": _texts(model.metadata),
    }
