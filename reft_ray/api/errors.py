"""Errors in OpenAI's envelope: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from reft_ray.api.schema import MEDIA_CODES
from reft_ray.core.errors import ReftError
from reft_ray.jobs import errors as records
from reft_ray.telemetry import catalog

_MESSAGES = {
    "json_invalid": "is not JSON",
    "model_attributes_type": "must be a JSON object, sent as application/json",
    "missing": "is required",
    "extra_forbidden": "is not a parameter here; check its spelling",
}
_CODES = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}
QUOTA_SECONDS = 60
_TYPES = {401: "invalid_request_error", 403: "permission_error", 429: "requests"}


class ApiError(Exception):
    """An error response. `message` must be complete in itself: some clients show nothing else."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        type: str | None = None,
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.type = type or _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.headers = dict(headers or {})
        self.extra = dict(extra or {})

    def body(self) -> dict[str, Any]:
        """The envelope; `extra` is merged into `error`, where the openai client keeps it."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
                **self.extra,
            }
        }


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """400: the request cannot be understood or accepted."""
    return ApiError(400, message, param=param, code=code)


def not_found(message: str, param: str | None = "id", code: str | None = None) -> ApiError:
    """404: no such object in this project."""
    return ApiError(404, message, param=param, code=code)


def conflict(message: str, code: str, param: str | None = None) -> ApiError:
    """409 that clients must not retry."""
    return ApiError(409, message, param=param, code=code, headers={"x-should-retry": "false"})


def too_large(message: str, param: str | None = None) -> ApiError:
    """413: more bytes than the operator allows."""
    return ApiError(413, message, param=param, code="file_too_large")


def busy(message: str, retry_after: float, status: int = 429) -> ApiError:
    """429 or 503: retry after `retry_after` seconds."""
    code = "rate_limit_exceeded" if status == 429 else "overloaded"
    return ApiError(status, message, code=code, headers={"retry-after": str(max(1, math.ceil(retry_after)))})


def unavailable() -> ApiError:
    """503: the database of the records does not answer, is full or is locked."""
    return busy("The service's records cannot be reached; try again.", 5, status=503)


def from_records(error: ReftError) -> ApiError:
    """The response to an error of the job records."""
    match error:
        case records.NotFoundError():
            return not_found(str(error))
        case records.ConflictError():
            return conflict(str(error), error.code)
        case records.InvalidError():
            return invalid(str(error), error.param, error.code)
        case records.TooLargeError():
            return too_large(str(error))
        case records.QuotaError():
            # Waiting helps once jobs have ended or files are deleted: a client's quick retries do not.
            headers = {"x-should-retry": "false", "retry-after": str(QUOTA_SECONDS)}
            return ApiError(429, str(error), type="insufficient_quota", code="insufficient_quota", headers=headers)
        case _:
            return invalid(str(error))


def install(app: FastAPI) -> None:
    """Send every error of this app in the envelope; FastAPI's 422 becomes 400."""
    for kind in (ApiError, ReftError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _handle)


def response_of(error: ApiError) -> JSONResponse:
    """The error as a response."""
    return JSONResponse(error.body(), error.status, error.headers)


async def _handle(request: Request, error: Exception) -> JSONResponse:
    match error:
        case ApiError():
            return response_of(error)
        case ReftError():
            if isinstance(error, records.QuotaError):
                request.app.state.recorder.count(catalog.RATE_LIMITED, limit=error.limit)
            return response_of(from_records(error))
        case RequestValidationError():
            return response_of(_validation_error(error))
        case HTTPException():
            return response_of(_http_error(request, error))
        case _:
            raise error


def _validation_error(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    code = first["type"] if first["type"] in MEDIA_CODES else _CODES.get(first["type"], "invalid_value")
    param = None if first["type"] == "json_invalid" else _param(first["loc"])
    message = _MESSAGES.get(first["type"], str(first["msg"]).removeprefix("Value error, "))
    # The value is not repeated: it may be the text to judge.
    return invalid(f"{param or 'body'}: {message}", param, code)


def _param(location: Sequence[int | str]) -> str | None:
    names = [str(name) for name in location if name not in ("body", "query", "path", "header")]
    return ".".join(names)[:200] or None


def _http_error(request: Request, error: HTTPException) -> ApiError:
    messages = {
        404: f"Unknown request URL: {request.method} {request.url.path[:200]}",
        405: f"{request.method} is not allowed here",
    }
    message = messages.get(error.status_code, str(error.detail))
    code = "unknown_url" if error.status_code == 404 else None
    return ApiError(error.status_code, message, code=code, headers=error.headers)
