"""`/models`: base models and the project's finetuned ones."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from reft_ray.api import serializers as wire
from reft_ray.api.auth import Caller
from reft_ray.api.errors import ApiError, not_found
from reft_ray.api.stores import Services
from reft_ray.jobs.errors import NotFoundError


def router(services: Services) -> APIRouter:
    """The routes of models; an id may hold slashes, raw or as `%2F`."""
    routes = APIRouter(tags=["models"])
    bases = services.settings.base_models

    @routes.get("/models")
    def list_models(caller: Caller) -> dict[str, Any]:
        """All models that this project can chat with."""
        base = [wire.base_model(name, entry.created_at) for name, entry in bases.items()]
        return wire.whole_list([*base, *map(wire.student, services.models.list(caller.project_id))])

    @routes.get("/models/{model:path}")
    def retrieve_model(model: str, caller: Caller) -> dict[str, Any]:
        """One model."""
        if model in bases:
            return wire.base_model(model, bases[model].created_at)
        try:
            return wire.student(services.models.get(model, caller.project_id))
        except NotFoundError:
            raise unknown_model(model) from None

    @routes.delete("/models/{model:path}")
    def delete_model(model: str, caller: Caller) -> dict[str, Any]:
        """Withdraw a finetuned model."""
        if model in bases:
            raise ApiError(403, "A base model cannot be deleted.", param="model", code="insufficient_permissions")
        try:
            services.models.delete(model, caller.project_id)
        except NotFoundError:
            raise unknown_model(model) from None
        services.audit.append("model.deleted", caller.actor, caller.project_id, {"id": model})
        return {"id": model, "object": "model", "deleted": True}

    return routes


def unknown_model(model: str) -> ApiError:
    """404 in OpenAI's words."""
    name = model[:256]
    return not_found(f"The model '{name}' does not exist or you do not have access to it.", "model", "model_not_found")
