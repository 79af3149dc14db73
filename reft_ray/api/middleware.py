"""The outermost middleware: request ids, the response to unexpected errors, request metrics."""

from __future__ import annotations

import logging
import time
import uuid

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reft_ray.api.errors import ApiError, response_of
from reft_ray.telemetry import catalog
from reft_ray.telemetry.logs import log_context
from reft_ray.telemetry.recorder import Recorder

logger = logging.getLogger(__name__)

PREFIX = "/v1"


class RequestMiddleware:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, recorder: Recorder) -> None:
        self._app = app
        self._recorder = recorder
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
                await self._app(scope, receive, stamped)
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
