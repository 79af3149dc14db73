"""`/training`: the API of the public training client, whose `base_url` is `http://HOST/v1/training`.

A loop of the customer sends data, steps and samples; each is a request in the log of `jobs.training_queue`, and its
result is polled. What this server has not is refused at once, and named.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from reft_ray.api import training_schema as schema
from reft_ray.api.auth import Caller, take
from reft_ray.api.errors import ApiError, busy, invalid
from reft_ray.api.stores import Stores
from reft_ray.api.training_wire import PROTOBUF, read_head, read_request
from reft_ray.core.errors import ReftError
from reft_ray.core.loss_inputs import check_inputs
from reft_ray.jobs.errors import InvalidError, NotFoundError
from reft_ray.jobs.tenants import Principal
from reft_ray.jobs.training import TrainingStore
from reft_ray.jobs.training_queue import DONE, QUEUED, Outcome, TrainingQueue, TrainingRequest
from reft_ray.jobs.training_records import ACTIVE, FAILED, PASSED, Sampler, TrainingModel, check_name

BASE = "/training/api/v1"
POLL_SECONDS = 20.0
"""How long a poll waits for its result; the client's own limit is 45 s."""
_FIRST_POLL, _LAST_POLL = 0.01, 0.2

_CONFIG: Mapping[str, Any] = {
    "pjwt_auth_enabled": False,
    "credential_default_source": "api_key",
    "parallel_fwdbwd_chunks": True,
    "proto_compress_fwdbwd": False,
    "fwdbwd_max_chunk_len": 256,
    "fwdbwd_max_chunk_bytes_count": 2_000_000,
    "use_pyqwest_transport": False,
    "sample_use_retrieve_futures": False,
    "custom_loss_server_side": False,
    "sample_join_sampling_session": True,
    "sample_max_concurrent_requests": 64,
}


def router(stores: Stores, store: TrainingStore, queue: TrainingQueue) -> APIRouter:
    """The routes of sessions, models, samplers, requests and their results."""
    routes = APIRouter(prefix=BASE, tags=["training"])
    settings = stores.settings.training
    if settings is None:
        raise ValueError("the training API needs its settings")

    def model_of(model_id: str, caller: Principal) -> TrainingModel:
        model = store.model(model_id, caller.project_id)
        if model.state != ACTIVE:
            reason = "its training has failed" if model.state == FAILED else "its session has ended"
            raise InvalidError(f"{model_id} takes no more requests: {reason}", "model_id")
        return model

    def accept(
        model: TrainingModel, number: int, kind: str, body: bytes, refusal: ReftError | None = None
    ) -> dict[str, Any]:
        """Log a request. One that is refused has its number too, so that the next one can run."""
        outcome = None if refusal is None else Outcome(error=str(refusal))
        made = queue.submit(model.id, number, kind, model.project_id, model.base_model, body, outcome=outcome)
        if refusal is not None:
            raise invalid(str(refusal))
        return _future(made, model.id)

    @routes.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The service answers."""
        return {"status": "ok"}

    @routes.post("/client/config")
    async def client_config(body: schema.ClientVersion) -> dict[str, Any]:
        """How the client is to talk to this server."""
        return dict(_CONFIG)

    @routes.post("/client/dynamic_config")
    async def dynamic_config(body: schema.ClientVersion) -> dict[str, Any]:
        """What may change while a client runs."""
        return {"refresh_interval_sec": 300, "sample_cancel_enabled": False, "sample_cancel_max_batch_size": 64}

    @routes.post("/telemetry")
    async def telemetry(request: Request) -> dict[str, str]:
        """Accept the client's telemetry and drop it: it may hold text of a customer."""
        return {"status": "accepted"}

    @routes.get("/get_server_capabilities")
    def capabilities(caller: Caller) -> dict[str, Any]:
        """The base models."""
        return {
            "supported_models": [
                {
                    "model_name": name,
                    "max_context_length": store.facts(name).get("context"),
                    "trainable": base.trainable,
                    "sampleable": True,
                }
                for name, base in stores.settings.base_models.items()
            ]
        }

    @routes.post("/create_session")
    def create_session(body: schema.SessionCreate, caller: Caller) -> dict[str, Any]:
        """Open a session."""
        if body.project_id not in (None, caller.project_id):
            raise invalid("project_id: the key belongs to another project", "project_id")
        metadata = {**(body.user_metadata or {}), **({"tags": body.tags} if body.tags else {})}
        session = store.open_session(caller, metadata, body.display_name)
        return {"type": "create_session", "session_id": session.id}

    @routes.post("/session_heartbeat")
    def heartbeat(body: schema.SessionRef, caller: Caller) -> dict[str, str]:
        """Keep a session."""
        session = store.seen(body.session_id, caller.project_id)
        if session.finished_at is not None:
            raise ApiError(410, "The session has ended.", code="session_finished")
        return {"type": "session_heartbeat"}

    @routes.post("/sessions/{session_id}/finish")
    def finish(session_id: str, body: schema.Finish, caller: Caller) -> dict[str, Any]:
        """End a session."""
        store.finish(session_id, caller.project_id)
        return {}

    @routes.post("/create_model")
    def create_model(body: schema.ModelCreate, caller: Caller) -> dict[str, Any]:
        """A new adapter in training."""
        base = stores.settings.base_models.get(body.base_model)
        if base is None or not base.trainable:
            raise ApiError(
                404, f"The base model {body.base_model[:128]!r} cannot be trained here.", code="model_not_found"
            )
        lora = body.lora_config or schema.Lora(rank=1)
        if lora.rank > settings.max_rank:
            raise invalid(f"lora_config.rank: at most {settings.max_rank} is allowed, not {lora.rank}", "lora_config")
        session = store.session(body.session_id, caller.project_id)
        if session.finished_at is not None:
            raise InvalidError(f"{session.id} has ended", "session_id")
        model_id = f"{session.id}:train:{body.model_seq_id}"
        result = {"type": "create_model", "model_id": model_id}
        made = queue.submit(
            model_id,
            0,
            "create_model",
            caller.project_id,
            body.base_model,
            body.model_dump_json().encode(),
            lambda connection: store.create_model_in(
                connection, session, body.model_seq_id, body.base_model, lora.model_dump(), body.user_metadata or {},
                caller.actor, 0,
            ),
            Outcome(json.dumps(result).encode()),
        )  # fmt: skip
        return _future(made, model_id)

    @routes.post("/get_info")
    def get_info(body: schema.ModelRef, caller: Caller) -> dict[str, Any]:
        """A model and its tokenizer."""
        model = store.model(body.model_id, caller.project_id)
        facts = store.facts(model.base_model)
        if not facts:
            raise busy("The worker of this base model has not started yet; try again.", 2, status=503)
        return {
            "type": "get_info",
            "model_id": model.id,
            "model_name": model.base_model,
            "is_lora": True,
            "lora_rank": model.lora["rank"],
            "optimizer_config": {"type": "adamw"},
            "model_data": {
                "arch": facts.get("arch"),
                "model_name": model.base_model,
                "tokenizer_id": facts.get("tokenizer"),
            },
        }

    @routes.post("/unload_model")
    def unload(body: schema.ModelRef, caller: Caller) -> dict[str, Any]:
        """End a model's training."""
        model = store.model(body.model_id, caller.project_id)
        store.set_state(model.id, "unloaded")
        return {"type": "unload_model", "model_id": model.id}

    @routes.post("/forward_backward")
    async def forward_backward(request: Request, caller: Caller) -> dict[str, Any]:
        """Judge data, and add the gradient of what is kept to the model's next step."""
        if request.headers.get("content-type", "").partition(";")[0] != PROTOBUF:
            raise invalid(f"forward_backward is read as {PROTOBUF}", "content-type")
        return await asyncio.to_thread(submit_data, request, await request.body(), caller)

    def submit_data(request: Request, body: bytes, caller: Principal) -> dict[str, Any]:
        model_id, number = read_head(body)
        model = model_of(model_id, caller)
        try:
            wanted = read_request(body)
            if not wanted.data:
                raise ReftError("data is empty")
            for datum in wanted.data:
                check_inputs(wanted.loss, datum.inputs, wanted.config)
        except ReftError as refusal:
            return accept(model, number, "forward_backward", body, refusal)
        charge(request, caller, sum(map(len, wanted.data)))
        return accept(model, number, "forward" if wanted.forward_only else "forward_backward", body)

    def charge(request: Request, caller: Principal, tokens: int) -> None:
        if caller.key_id is not None:
            take(stores.rate_limits, request, "tokens", tokens, caller, request.app.state.recorder)

    @routes.post("/optim_step")
    def optim_step(body: schema.OptimStep, caller: Caller) -> dict[str, Any]:
        """Step, with the teacher's guidance."""
        model = model_of(body.model_id, caller)
        rate, most = (body.adam_params or schema.AdamParams()).learning_rate, settings.max_learning_rate
        refusal = None
        if rate > most:
            refusal = ReftError(f"adam_params.learning_rate: at most {most:g} is allowed here, not {rate:g}")
        return accept(model, body.seq_id, "optim_step", body.model_dump_json().encode(), refusal)

    @routes.post("/save_weights")
    def save_weights(body: schema.Save, caller: Caller) -> dict[str, Any]:
        """Save weights and optimiser."""
        return save(body, caller, "save_weights")

    @routes.post("/save_weights_for_sampler")
    def save_weights_for_sampler(body: schema.SaveForSampler, caller: Caller) -> dict[str, Any]:
        """Save weights to sample from. A name is gated; a sampler without one serves its own session."""
        return save(body, caller, "save_weights_for_sampler")

    @routes.post("/save_weights_external")
    def save_weights_external(body: schema.SaveExternal, caller: Caller) -> dict[str, Any]:
        """Save weights for download, if they pass the release gate."""
        return save(body, caller, "save_weights_external")

    def save(body: schema.Save | schema.SaveForSampler | schema.SaveExternal, caller: Principal, kind: str) -> Any:
        model = model_of(body.model_id, caller)
        refusal = None
        if body.path is not None:
            try:
                check_name(body.path)
            except InvalidError as error:
                refusal = error
        return accept(model, body.seq_id, kind, body.model_dump_json().encode(), refusal)

    @routes.post("/load_weights")
    def load_weights(body: schema.Load, caller: Caller) -> dict[str, Any]:
        """Load weights into a model, or into a new one."""
        checkpoint = store.checkpoint(body.path, caller.project_id)
        if checkpoint.kind != "weights":
            raise InvalidError("path: load from `weights`, which save_weights makes", "path")
        source = store.model(checkpoint.model_id, caller.project_id)
        payload = body.model_dump_json().encode()
        if body.model_id is not None:
            return accept(model_of(body.model_id, caller), body.seq_id or 0, "load_weights", payload)
        if body.base_model not in (None, source.base_model):
            raise InvalidError(f"base_model: these weights are of {source.base_model}", "base_model")
        session = store.session(body.session_id or "", caller.project_id)
        number = body.model_seq_id or 0
        model_id = f"{session.id}:train:{number}"
        made = queue.submit(
            model_id,
            0,
            "load_weights",
            caller.project_id,
            source.base_model,
            payload,
            lambda connection: store.create_model_in(
                connection, session, number, source.base_model, source.lora, body.user_metadata or {}, caller.actor, -1
            ),
        )
        return _future(made, model_id)

    @routes.post("/create_sampling_session")
    def create_sampler(body: schema.SamplerCreate, caller: Caller) -> dict[str, Any]:
        """A sampler of the base model, of this session's own weights, or of weights that passed the gate."""
        session = store.session(body.session_id, caller.project_id)
        if body.model_path is None:
            if body.base_model not in stores.settings.base_models:
                raise ApiError(404, f"There is no base model {str(body.base_model)[:128]!r}.", code="model_not_found")
            sampler = store.add_sampler(session, body.sampling_session_seq_id, str(body.base_model), None)
        else:
            checkpoint = store.checkpoint(body.model_path, caller.project_id)
            if checkpoint.kind != "sampler_weights":
                raise InvalidError("model_path: sample from `sampler_weights`", "model_path")
            if checkpoint.session_id != session.id and checkpoint.gate != PASSED:
                raise gated(checkpoint.id, checkpoint.gate, checkpoint.checks)
            base = store.model(checkpoint.model_id, caller.project_id).base_model
            sampler = store.add_sampler(session, body.sampling_session_seq_id, base, checkpoint.id)
        return {"type": "create_sampling_session", "sampling_session_id": sampler.id}

    @routes.post("/join_sampling_session")
    def join_sampler(body: schema.SamplerRef, caller: Caller) -> dict[str, Any]:
        """One more client of a sampler."""
        number = store.join_sampler(body.sampling_session_id, caller.project_id)
        return {"type": "join_sampling_session", "client_counter": number}

    @routes.get("/samplers/{sampler_id}")
    def get_sampler(sampler_id: str, caller: Caller) -> dict[str, Any]:
        """A sampler."""
        return _sampler(store.sampler(sampler_id, caller.project_id))

    @routes.post("/asample")
    def sample(body: schema.SampleRequest, request: Request, caller: Caller) -> dict[str, Any]:
        """Sample from a prompt."""
        sampler = store.sampler(str(body.sampling_session_id), caller.project_id)
        tokens = body.prompt.tokens
        if not tokens:
            raise invalid("prompt has no tokens", "prompt")
        if body.num_samples > settings.max_samples:
            raise invalid(f"num_samples: at most {settings.max_samples} are made at once", "num_samples")
        charge(request, caller, len(tokens) + body.num_samples * (body.sampling_params.max_tokens or 0))
        number = int(body.seq_id or 0)
        made = queue.submit(
            sampler.id, number, "sample", caller.project_id, sampler.base_model, body.model_dump_json().encode()
        )
        names = [f"{sampler.id}:{number}:{index}" for index in range(body.num_samples)]
        return {**_future(made, None), "sample_sequence_ids": names}

    @routes.post("/retrieve_future")
    async def retrieve(body: schema.Retrieve, caller: Caller) -> Response:
        """The result of a request; 408 while there is none."""
        deadline, pause = time.monotonic() + POLL_SECONDS, _FIRST_POLL
        found = await asyncio.to_thread(queue.get, body.request_id, caller.project_id)
        while found.status == QUEUED and time.monotonic() < deadline:
            await asyncio.sleep(pause)
            pause = min(1.5 * pause, _LAST_POLL)
            found = await asyncio.to_thread(queue.get, body.request_id, caller.project_id)
        if found.status == QUEUED:
            return JSONResponse({"type": "try_again", "request_id": found.id, "queue_state": "active"}, 408)
        if found.status == DONE:
            try:
                content = await asyncio.to_thread(queue.result, found.id)
            except NotFoundError:
                raise ApiError(410, "The result is not kept any more.", code="result_expired") from None
            return Response(content, media_type=PROTOBUF if found.binary else "application/json")
        category, _, message = str(found.error).partition(":")
        return JSONResponse({"error": message, "category": category})

    for path, methods in schema.UNSUPPORTED.items():
        routes.add_api_route(path, _unsupported, methods=list(methods), include_in_schema=False)
    return routes


def gated(path: str, gate: str, checks: Any) -> ApiError:
    """403: weights that the release gate has not passed, with the limits that they failed."""
    reason = {
        "pending": "the release gate has not run yet; try again later",
        "none": "they were not saved for use outside their own training loop",
    }.get(gate, "the release gate: " + "; ".join(item for item in checks if item.endswith("failed")))
    return ApiError(403, f"{path} is not released: {reason}", code="gate_not_passed")


async def _unsupported(request: Request) -> Response:
    name = request.url.path.partition(f"{BASE}/")[2]
    raise ApiError(404, f"{name[:200]} is not supported by this server.", code="unsupported")


def _future(request: TrainingRequest, model_id: str | None) -> dict[str, Any]:
    return {"request_id": request.id, "model_id": model_id}


def _sampler(sampler: Sampler) -> dict[str, Any]:
    return {"sampler_id": sampler.id, "base_model": sampler.base_model, "model_path": sampler.checkpoint_id}
