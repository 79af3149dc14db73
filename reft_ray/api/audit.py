"""`/audit`: the hash-chained log of who did what, for leads, operators and auditors."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query

from reft_ray.api.stores import Stores
from reft_ray.jobs.audit import Entry


def router(stores: Stores) -> APIRouter:
    """The routes of the audit log; the `after` of a page is an entry's number."""
    routes = APIRouter(tags=["audit"])

    @routes.get("/audit")
    def list_entries(
        after: Annotated[int, Query(ge=0, lt=1 << 62)] = 0,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        type: Annotated[str | None, Query(max_length=64, description="Such as `review.approved`.")] = None,
        project: Annotated[str | None, Query(max_length=64)] = None,
    ) -> dict[str, Any]:
        """List entries, oldest first."""
        found = stores.audit.entries(after, limit + 1, kind=type, project_id=project)
        return {
            "object": "list",
            "data": [entry_body(entry) for entry in found[:limit]],
            "has_more": len(found) > limit,
        }

    @routes.get("/audit/verify")
    def verify(
        head: Annotated[str | None, Query(pattern="^[0-9a-f]{64}$", description="An earlier `head`.")] = None,
    ) -> dict[str, Any]:
        """Recompute the whole chain; `fault` names the first wrong entry. Keep `head` elsewhere."""
        return {"object": "audit.verification", **asdict(stores.audit.verify(head))}

    return routes


def entry_body(entry: Entry) -> dict[str, Any]:
    """The `audit.entry` object: all fields of the hash."""
    return {"object": "audit.entry", **asdict(entry)}
