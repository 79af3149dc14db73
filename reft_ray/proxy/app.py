"""The proxy as a FastAPI application.

It forwards a list of calls and refuses all others: a path that it does not know could carry text past the filter.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.datastructures import FormData, UploadFile

from reft_ray.api.admission import Gate
from reft_ray.api.context import FilterContext
from reft_ray.api.errors import ApiError, invalid, not_found
from reft_ray.api.filter_app import create_filter_app
from reft_ray.api.limits import FORM_BYTES, Limit, conversation_limit
from reft_ray.api.moderator import Moderator
from reft_ray.api.settings import FilterSettings
from reft_ray.api.verdict_stream import NDJSON
from reft_ray.proxy import chat
from reft_ray.proxy.gates import KeyGate, UpstreamGate
from reft_ray.proxy.training_files import Records, ScreenedFile, screen_upload
from reft_ray.proxy.upstream import ProxySettings, Upstream, document_of, relayed
from reft_ray.telemetry.recorder import NullRecorder, Recorder

_FORWARDED = (
    ("GET", "/files"),
    ("GET", "/files/{id}"),
    ("GET", "/files/{id}/content"),
    ("GET", "/fine_tuning/jobs"),
    ("GET", "/fine_tuning/jobs/{id}"),
    ("GET", "/fine_tuning/jobs/{id}/events"),
    ("GET", "/fine_tuning/jobs/{id}/checkpoints"),
    ("POST", "/fine_tuning/jobs/{id}/cancel"),
    ("POST", "/fine_tuning/jobs/{id}/pause"),
    ("POST", "/fine_tuning/jobs/{id}/resume"),
    ("GET", "/models"),
    ("GET", "/models/{id:path}"),
    ("DELETE", "/models/{id:path}"),
)


def create_proxy(
    moderator: Moderator,
    settings: ProxySettings,
    filter_settings: FilterSettings | None = None,
    recorder: Recorder | None = None,
    gate: Gate | None = None,
) -> FastAPI:
    """The proxy's calls under `/v1`, and the filter's own (`/moderations`, `/screenings`, `/teacher`).

    `gate` is by default that of the settings.
    """
    filter_settings = filter_settings or FilterSettings()
    context = FilterContext(moderator, filter_settings, recorder or NullRecorder())
    upstream, gate = Upstream(settings), gate or gate_of(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await upstream.close()
        if isinstance(gate, UpstreamGate):
            gate.close()

    return create_filter_app(
        moderator,
        filter_settings,
        recorder=recorder,
        routers=[_router(context, settings, upstream, Records(Path(settings.state)))],
        gate=gate,
        limits={
            "POST /v1/files": Limit(settings.max_file_bytes + FORM_BYTES, kind="form"),
            "POST /v1/chat/completions": conversation_limit(filter_settings.max_body_bytes),
        },
        lifespan=lifespan,
    )


def gate_of(settings: ProxySettings) -> Gate | None:
    """Who may call; None for this machine alone, where everybody would use the operator's upstream key."""
    if settings.client_key is not None:
        return KeyGate(settings.client_key)
    return None if settings.upstream_key is not None else UpstreamGate(settings.upstream)


def _router(context: FilterContext, settings: ProxySettings, upstream: Upstream, records: Records) -> APIRouter:
    routes = APIRouter(tags=["proxy"])

    @routes.post("/files", response_model=None)
    async def upload(request: Request) -> Response:
        """Screen a training file and forward its kept rows."""
        async with request.form(max_files=1, max_fields=16) as form:
            file = _training_file(form)
            found = await screen_upload(file, context)
            try:
                _check(found, settings)
                fields = {k: v for k, v in form.multi_items() if k.startswith("expires_after[") and isinstance(v, str)}
                response = await upstream.send(
                    request, "POST", "/files",
                    data={"purpose": "fine-tune", **fields},
                    files={"file": (file.filename or "train.jsonl", found.kept, "application/jsonl")},
                )  # fmt: skip
                if response.is_error:
                    return relayed(response)
                document = document_of(response.content)
                file_id = str(document["id"])
                records.add(file_id, found.summary, found.evidence)
            finally:
                found.close()
        evidence = {"evidence": f"/v1/files/{file_id}/screening", "withheld": found.shown}
        return relayed(response, document | {"reft": found.summary | evidence})

    @routes.get("/files/{file_id}/screening", response_model=None)
    async def screening(file_id: str, request: Request) -> Response:
        """The evidence of a screened file, for a client that may see the file upstream."""
        response = await upstream.send(request, "GET", f"/files/{_segment(file_id)}")
        if response.is_error:
            return relayed(response)
        if not records.knows(file_id):
            raise not_found(f"File {file_id} was not screened here.")
        return FileResponse(records.path(file_id), media_type=NDJSON)

    @routes.delete("/files/{file_id}", response_model=None)
    async def delete(file_id: str, request: Request) -> Response:
        """Delete a file upstream, and its evidence."""
        response = await upstream.send(request, "DELETE", f"/files/{_segment(file_id)}")
        if response.is_success:
            records.remove(file_id)
        return relayed(response)

    @routes.post("/fine_tuning/jobs", response_model=None)
    async def create_job(request: Request) -> Response:
        """Start a job on files that were screened here."""
        body = await _json(request)
        for name in ("training_file", "validation_file"):
            file_id = body.get(name)
            if file_id is not None and not (isinstance(file_id, str) and records.knows(file_id)):
                raise invalid(
                    f"{name}: this file was not screened by this gateway; upload it here.", name, "unscreened_file"
                )
        return relayed(await upstream.send(request, "POST", "/fine_tuning/jobs", json=body))

    @routes.post("/chat/completions", response_model=None)
    async def complete(request: Request) -> Response:
        """Judge the request, forward it, and judge the whole answer before any of it is passed on."""
        body = await _json(request)
        streams = body.get("stream") is True
        if await chat.flagged(context, [chat.asked(body)], settings.judging_seconds):
            return _blocked(body, streams)
        async with upstream.stream(request, "POST", "/chat/completions", json=body) as response:
            content = await _whole(response, settings.max_answer_bytes)
            if response.is_error:
                return relayed(response, content)
            as_stream = response.headers.get("content-type", "").startswith("text/event-stream")
            events = chat.events_of(content) if as_stream else [document_of(content)]
            if await chat.flagged(context, chat.answered(events), settings.judging_seconds):
                return _blocked(body, streams)
            return relayed(response, content)

    for method, path in _FORWARDED:
        routes.add_api_route(path, _forward(upstream), methods=[method], response_model=None)
    return routes


def _forward(upstream: Upstream) -> Any:
    async def forward(request: Request) -> Response:
        """Forwarded as it is."""
        raw: bytes = request.scope.get("raw_path") or request.scope["path"].encode()
        path = raw.decode("ascii").partition("?")[0].removeprefix("/v1")
        if any(part in ("..", ".") for part in request.scope["path"].split("/")):
            raise not_found("The path has a relative part.", None)
        query = request.scope["query_string"].decode("ascii")
        return relayed(await upstream.send(request, request.method, path + (f"?{query}" if query else "")))

    return forward


def _training_file(form: FormData) -> UploadFile:
    """The file of an upload. Raises ApiError unless there is one file and one purpose, `fine-tune`."""
    if form.getlist("purpose") != ["fine-tune"]:
        raise invalid("This gateway takes files of purpose 'fine-tune' only.", "purpose", "unsupported_purpose")
    files = form.getlist("file")
    if len(files) != 1 or not isinstance(files[0], UploadFile):
        raise invalid("file: one file is required", "file", "missing_required_parameter")
    return files[0]


def _check(found: ScreenedFile, settings: ProxySettings) -> None:
    """Raise ApiError 400 for a file of which nothing is forwarded."""
    counts, kept = found.counts, found.counts["allow"]
    others = counts.total() - kept
    if kept and found.reject_ratio <= settings.max_reject_ratio and (settings.policy == "filter" or not others):
        return
    lines = ", ".join(str(row["line"]) for row in found.shown[:10])
    raise ApiError(
        400,
        f"The file was not forwarded: of {counts.total()} rows {counts['block']} are blocked, {counts['review']} need "
        f"review and {counts['invalid']} are invalid; first lines: {lines}.",
        param="file",
        code="unsafe_training_data" if counts["block"] + counts["review"] else "invalid_file_format",
        extra={"rows": found.shown},
    )


async def _json(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.body(), object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise invalid("The body must be a JSON object in which no key is given twice.")
    return body


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises ValueError for a repeated key: the upstream may read another of its values than the filter."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError
    return found


async def _whole(response: httpx.Response, most: int) -> bytes:
    content = bytearray()
    async for piece in response.aiter_bytes():
        content += piece
        if len(content) > most:
            raise ApiError(502, "The upstream's answer is too long to be judged.", code="upstream_too_long")
    return bytes(content)


def _blocked(body: dict[str, Any], streams: bool) -> Response:
    if streams:
        return Response(chat.blocked_stream(body), media_type="text/event-stream")
    return JSONResponse(chat.blocked(body))


def _segment(name: str) -> str:
    """A path segment. Raises ApiError 404 for one that could leave its place, or is none."""
    if not name.isprintable() or any(character in "/?#%\\" for character in name) or name in ("", ".", ".."):
        raise not_found(f"No such File object: {name[:100]}")
    return name
