"""The outermost middleware: request ids, body limits, the response to unexpected errors, request metrics."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reft_ray.api.errors import ApiError, response_of
from reft_ray.telemetry import catalog
from reft_ray.telemetry.logs import log_context
from reft_ray.telemetry.recorder import Recorder

logger = logging.getLogger(__name__)

UNLIMITED = -1
"""The limit of routes that limit their bodies themselves."""

PREFIX = "/v1"


class RequestMiddleware:
    """ASGI middleware. `limits` maps path prefixes to body limits in bytes; the longest matching prefix applies."""

    def __init__(self, app: ASGIApp, recorder: Recorder, limits: Mapping[str, int]) -> None:
        self._app = app
        self._recorder = recorder
        self._limits = sorted(limits.items(), key=lambda item: -len(item[0]))
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        status: int | None = None

        async def stamped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        started = time.perf_counter()
        self._in_flight(+1)
        try:
            with log_context(request_id=request_id):
                await self._app(scope, self._limited(scope, receive), stamped)
        except ClientDisconnect:
            status = 499
        except Exception:
            # The traceback shows code, not data: row texts never reach the log.
            logger.exception("a request failed", extra={"request_id": request_id})
            if status is not None:
                raise
            failure = ApiError(500, f"The server failed on this request; quote {request_id} when reporting it.")
            await response_of(failure)(scope, receive, stamped)
        finally:
            self._in_flight(-1)
            self._count(scope, status, time.perf_counter() - started)

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        limit = next((limit for prefix, limit in self._limits if scope["path"].startswith(prefix)), UNLIMITED)
        if limit == UNLIMITED:
            return receive
        seen = 0

        async def bounded() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > limit:
                    raise HTTPException(413, f"The body exceeds the limit of {limit:,} bytes.")
            return message

        return bounded

    def _in_flight(self, change: int) -> None:
        self._open += change
        self._recorder.set(catalog.API_IN_FLIGHT, self._open)

    def _count(self, scope: Scope, status: int | None, seconds: float) -> None:
        route = _template(scope)
        code = str(status if status is not None else 499)
        self._recorder.count(catalog.API_REQUESTS, route=route, method=scope["method"], code=code)
        self._recorder.observe(catalog.API_SECONDS, seconds, route=route)


def _template(scope: Scope) -> str:
    """The route's path with its placeholders; routes of included routers lack the prefix."""
    path = getattr(scope.get("route"), "path", None)
    if path is None:
        return "unmatched"
    return path if path.startswith(PREFIX) or not scope["path"].startswith(PREFIX) else PREFIX + path
