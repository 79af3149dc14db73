"""`/uploads`: a file in several requests."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.datastructures import UploadFile

from reft_ray.api import serializers as wire
from reft_ray.api.auth import Caller
from reft_ray.api.errors import invalid
from reft_ray.api.files import check_purpose, chunks_of, form_bytes, multipart, working
from reft_ray.api.stores import Stores


class ExpiresAfter(BaseModel):
    """How long the completed file is kept."""

    anchor: Literal["created_at"]
    seconds: int


class UploadBody(BaseModel):
    """The body of `POST /uploads`."""

    bytes: int = Field(ge=1)
    filename: str
    mime_type: str = Field(max_length=128)
    purpose: str
    expires_after: ExpiresAfter | None = None


class CompleteBody(BaseModel):
    """The body of `POST /uploads/{id}/complete`."""

    part_ids: list[str] = Field(max_length=10_000)
    md5: str | None = None


def router(stores: Stores) -> APIRouter:
    """The routes of uploads."""
    routes = APIRouter(tags=["uploads"])
    uploads = stores.uploads

    @routes.post("/uploads")
    def create_upload(body: UploadBody, caller: Caller) -> dict[str, Any]:
        """Create an upload."""
        check_purpose(body.purpose)
        lifetime = body.expires_after.seconds if body.expires_after else None
        record = uploads.create(caller.project_id, body.filename, body.purpose, body.bytes, body.mime_type, lifetime)
        return wire.upload(record)

    @routes.post("/uploads/{upload_id}/parts", openapi_extra=multipart("data"))
    async def add_part(upload_id: str, request: Request, caller: Caller) -> dict[str, Any]:
        """Add a part (multipart `data`); parts may arrive in any order and in parallel."""
        await asyncio.to_thread(uploads.check_room, upload_id, caller.project_id, form_bytes(request))
        async with request.form(max_files=1, max_fields=4) as form, working(request, caller):
            content = form.get("data")
            if not isinstance(content, UploadFile):
                raise invalid("Missing required parameter: 'data'.", "data", "missing_required_parameter")
            part_id, created_at = await asyncio.to_thread(
                uploads.add_part, upload_id, caller.project_id, chunks_of(content)
            )
        return {
            "id": part_id,
            "object": "upload.part",
            "created_at": wire.seconds(created_at),
            "upload_id": upload_id,
        }

    @routes.post("/uploads/{upload_id}/complete")
    def complete_upload(upload_id: str, body: CompleteBody, caller: Caller) -> dict[str, Any]:
        """Join the parts into a file."""
        record, finished = uploads.complete(upload_id, caller.project_id, body.part_ids, body.md5, caller.actor)
        return wire.upload(record, finished)

    @routes.post("/uploads/{upload_id}/cancel")
    def cancel_upload(upload_id: str, caller: Caller) -> dict[str, Any]:
        """Cancel an upload."""
        return wire.upload(uploads.cancel(upload_id, caller.project_id))

    return routes
