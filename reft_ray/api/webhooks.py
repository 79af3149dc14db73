"""`/webhook_endpoints`: URLs that receive the events of a project's finished jobs."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from reft_ray.api import serializers as wire
from reft_ray.api.auth import Caller
from reft_ray.api.stores import Stores
from reft_ray.jobs.webhooks import EVENTS, Endpoint


class EndpointBody(BaseModel):
    """The body of `POST /webhook_endpoints`."""

    model_config = ConfigDict(extra="forbid")

    url: str = Field(max_length=2048)
    events: list[str] = Field(default_factory=lambda: list(EVENTS))


def router(stores: Stores) -> APIRouter:
    """The routes of webhook endpoints."""
    routes = APIRouter(tags=["webhooks"])
    webhooks = stores.webhooks

    @routes.post("/webhook_endpoints")
    def create_endpoint(body: EndpointBody, caller: Caller) -> dict[str, Any]:
        """Register an endpoint. Only this response has the secret that `client.webhooks.unwrap` needs."""
        endpoint = webhooks.add(caller.project_id, body.url, body.events, caller.actor)
        return {**_wire(endpoint), "secret": endpoint.secret}

    @routes.get("/webhook_endpoints")
    def list_endpoints(caller: Caller) -> dict[str, Any]:
        """List the project's endpoints, without their secrets."""
        return wire.whole_list(map(_wire, webhooks.list(caller.project_id)))

    @routes.delete("/webhook_endpoints/{endpoint_id}")
    def delete_endpoint(endpoint_id: str, caller: Caller) -> dict[str, Any]:
        """Delete an endpoint."""
        webhooks.remove(endpoint_id, caller.project_id, caller.actor)
        return {"id": endpoint_id, "object": "webhook_endpoint", "deleted": True}

    return routes


def _wire(endpoint: Endpoint) -> dict[str, Any]:
    return {
        "id": endpoint.id,
        "object": "webhook_endpoint",
        "created_at": wire.seconds(endpoint.created_at),
        "url": endpoint.url,
        "events": list(endpoint.events),
        "status": "enabled" if endpoint.disabled_at is None else "disabled",
    }
