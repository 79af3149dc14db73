"""`/models`: base models and the project's finetuned ones."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from reft_ray.api import serializers as wire
from reft_ray.api.auth import Caller
from reft_ray.api.errors import ApiError, not_found
from reft_ray.api.stores import Stores
from reft_ray.jobs.errors import NotFoundError


def router(stores: Stores) -> APIRouter:
    """The routes of models; an id may contain slashes, raw or as `%2F`."""
    routes = APIRouter(tags=["models"])
    bases = stores.settings.base_models

    @routes.get("/models")
    def list_models(caller: Caller) -> dict[str, Any]:
        """List the models that this project can chat with."""
        base = [wire.base_model(name, entry.created_at) for name, entry in bases.items()]
        return wire.whole_list([*base, *map(wire.student, stores.models.list(caller.project_id))])

    @routes.get("/models/{model:path}")
    def retrieve_model(model: str, caller: Caller) -> dict[str, Any]:
        """Retrieve a model."""
        if model in bases:
            return wire.base_model(model, bases[model].created_at)
        try:
            return wire.student(stores.models.get(model, caller.project_id))
        except NotFoundError:
            raise unknown_model(model) from None

    @routes.delete("/models/{model:path}")
    def delete_model(model: str, caller: Caller) -> dict[str, Any]:
        """Delete a finetuned model."""
        if model in bases:
            raise ApiError(403, "A base model cannot be deleted.", param="model", code="insufficient_permissions")
        try:
            stores.models.delete(model, caller.project_id, caller.actor)
        except NotFoundError:
            raise unknown_model(model) from None
        return {"id": model, "object": "model", "deleted": True}

    return routes


def unknown_model(model: str) -> ApiError:
    """OpenAI's 404 for models."""
    name = model[:256]
    return not_found(f"The model '{name}' does not exist or you do not have access to it.", "model", "model_not_found")
