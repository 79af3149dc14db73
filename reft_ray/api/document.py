"""The OpenAPI document, with the errors that are really sent."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

_TEXT_OR_NULL = {"anyOf": [{"type": "string"}, {"type": "null"}]}
_ERROR = {
    "title": "Error",
    "description": "OpenAI's error envelope; further keys may stand beside these four.",
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _TEXT_OR_NULL,
                "code": _TEXT_OR_NULL,
            },
        }
    },
}
_ANSWER = {
    "description": "An error; see `code`. 429 and 503 carry `retry-after`.",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
}
_UNSENT = ("HTTPValidationError", "ValidationError")


def install(app: FastAPI) -> None:
    """Make `app` describe its errors as `api.errors` sends them: never FastAPI's 422."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
            schemas = found.setdefault("components", {}).setdefault("schemas", {})
            for name in _UNSENT:
                schemas.pop(name, None)
            schemas["Error"] = _ERROR
            for path in found["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
                    operation["responses"] |= {"4XX": _ANSWER, "5XX": _ANSWER}
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
