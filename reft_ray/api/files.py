"""`/files`: upload, list, download and delete."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from starlette.datastructures import UploadFile

from reft_ray.api import serializers as wire
from reft_ray.api.auth import Caller
from reft_ray.api.body import declared_bytes
from reft_ray.api.errors import invalid
from reft_ray.api.limits import FORM_BYTES
from reft_ray.api.shares import Shares
from reft_ray.api.stores import Stores
from reft_ray.jobs.content import CHUNK_BYTES
from reft_ray.jobs.files import PURPOSES
from reft_ray.jobs.tenants import Principal

BYTES = "application/octet-stream"


def router(stores: Stores) -> APIRouter:
    """The routes of files."""
    routes = APIRouter(tags=["files"])
    files = stores.files

    @routes.post(
        "/files", openapi_extra=multipart("file", "purpose", "expires_after[anchor]", "expires_after[seconds]")
    )
    async def create_file(request: Request, caller: Caller) -> dict[str, Any]:
        """Store a file (multipart: `purpose`, `file`, optional `expires_after[...]`)."""
        await asyncio.to_thread(files.check_room, caller.project_id, form_bytes(request))
        async with request.form(max_files=1, max_fields=16) as form, working(request, caller):
            content, purpose = form.get("file"), form.get("purpose")
            if not isinstance(content, UploadFile):
                raise invalid("Missing required parameter: 'file'.", "file", "missing_required_parameter")
            check_purpose(purpose)
            expires_after = _expires_after(form.get("expires_after[anchor]"), form.get("expires_after[seconds]"))
            record = await asyncio.to_thread(
                files.create,
                caller.project_id,
                content.filename or "upload",
                str(purpose),
                chunks_of(content),
                expires_after=expires_after,
                actor=caller.actor,
            )
        return wire.file(record)

    @routes.get("/files")
    def list_files(
        caller: Caller,
        purpose: str | None = None,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=10000)] = 10000,
        order: Literal["asc", "desc"] = "desc",
    ) -> dict[str, Any]:
        """List the project's files."""
        page = files.list(caller.project_id, purpose=purpose, after=after, limit=limit, ascending=order == "asc")
        return wire.cursor_page(page, wire.file, ends=True)

    @routes.get("/files/{file_id}")
    def retrieve_file(file_id: str, caller: Caller) -> dict[str, Any]:
        """Retrieve a file's record."""
        return wire.file(files.get(file_id, caller.project_id))

    @routes.get("/files/{file_id}/content", response_class=StreamingResponse, responses={200: {"content": {BYTES: {}}}})
    def file_content(file_id: str, caller: Caller) -> StreamingResponse:
        """Download a file."""
        record = files.get(file_id, caller.project_id)
        content = files.read(file_id, caller.project_id)
        return StreamingResponse(
            content,
            media_type=BYTES,
            headers={"content-length": str(record.bytes), "x-content-type-options": "nosniff"},
        )

    @routes.delete("/files/{file_id}")
    def delete_file(file_id: str, caller: Caller) -> dict[str, Any]:
        """Delete a file and the files made from it."""
        files.delete(file_id, caller.project_id, caller.actor)
        return {"id": file_id, "object": "file", "deleted": True}

    return routes


def multipart(file: str, *fields: str) -> dict[str, Any]:
    """The OpenAPI description of a form with a file; of the other fields the first is required."""
    properties = {field: {"type": "string"} for field in fields}
    properties[file] = {"type": "string", "contentMediaType": BYTES}
    schema = {"type": "object", "properties": properties, "required": [file, *fields[:1]]}
    return {"requestBody": {"content": {"multipart/form-data": {"schema": schema}}, "required": True}}


def check_purpose(purpose: object) -> None:
    """Raise ApiError 400 for a purpose that OpenAI does not define."""
    if purpose is None:
        raise invalid("Missing required parameter: 'purpose'.", "purpose", "missing_required_parameter")
    if purpose not in PURPOSES:
        raise invalid(f"'{str(purpose)[:32]}' is not one of {list(PURPOSES)} - 'purpose'", "purpose")


def _expires_after(anchor: object, seconds: object) -> int | None:
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise invalid("expires_after[anchor] must be 'created_at'.", "expires_after.anchor")
    if not isinstance(seconds, str) or not re.fullmatch(r"[0-9]{1,12}", seconds):
        raise invalid("expires_after[seconds] must be an integer.", "expires_after.seconds")
    return int(seconds)


def form_bytes(request: Request) -> int:
    """The least that the file of a form has, from the length that its client declared."""
    return max(0, declared_bytes(request) - FORM_BYTES)


def working(request: Request, caller: Principal) -> AbstractAsyncContextManager[None]:
    """One of the project's threads during the block, for a route that reads its own body."""
    threads: Shares = request.state.threads
    return threads.held(caller.project_id)


def chunks_of(content: UploadFile) -> Iterator[bytes]:
    """Read an uploaded file in chunks."""
    while chunk := content.file.read(CHUNK_BYTES):
        yield chunk
