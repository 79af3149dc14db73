"""`POST /erasures`: the rows of one person, erased from all files of the project."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from reft_ray.api.auth import Caller
from reft_ray.api.stores import Stores
from reft_ray.jobs.erasure import erase


class ErasureBody(BaseModel):
    """The body: a text that all rows of the person have, and no others."""

    model_config = ConfigDict(extra="forbid")

    subject: str = Field(max_length=1000)
    dry_run: bool = False


def router(stores: Stores) -> APIRouter:
    """The route of erasures."""
    routes = APIRouter(tags=["files"])

    @routes.post("/erasures")
    def create_erasure(body: ErasureBody, caller: Caller) -> dict[str, Any]:
        """Erase every row of the project that contains the subject."""
        found = erase(stores.files, caller.project_id, body.subject, caller.actor, body.dry_run)
        return {
            "object": "erasure",
            "dry_run": body.dry_run,
            "rows": found.rows,
            "files": [{"id": id, "rows": rows} for id, rows in found.files.items()],
            "unread": list(found.unread),
            "models": list(found.models),
        }

    return routes
