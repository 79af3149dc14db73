"""Admission: who asks, may they, and is there room, from the headers alone; only then is a body read.

A pure ASGI layer in front of all routes. FastAPI would read and parse a body before any dependency runs.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reft_ray.api.body import declared_bytes, paced, read_json, replay
from reft_ray.api.errors import ApiError, busy, invalid, response_of, too_large, unavailable
from reft_ray.api.limits import Limit, LimitTable
from reft_ray.api.origins import check_client, check_origin
from reft_ray.api.settings import FilterSettings
from reft_ray.api.shares import OWNER, Call, Shares, call_at_work
from reft_ray.jobs.database import UNREACHABLE
from reft_ray.jobs.tenants import Principal

PREFIX = "/v1/"
THREADS, THREADS_OF_ONE = 32, 8
"""Threads that routes work in, below the 40 of the server's pool; and those that one project may hold."""

REFUSAL_SECONDS, LONGEST_REFUSAL = 0.05, 5.0
"""Between two refusals of one project's requests beyond its rate, and how long one waits at most."""

_PROBES = ("/healthz", "/readyz", "/metrics")
_BODIES = ("POST", "PUT", "PATCH")

T = TypeVar("T")


class Gate(Protocol):
    """Who may call: `api.auth.Authenticator`. The methods block, and raise ApiError."""

    def keyless(self) -> bool:
        """Whether the service answers without keys."""
        ...

    def admit(self, request: HTTPConnection) -> Principal:
        """The caller, whose key, scope and rate allow the request."""
        ...

    def charge(self, request: HTTPConnection, principal: Principal, texts: int) -> None:
        """Charge the tokens of `texts` bytes that the teacher is to read."""
        ...


class Admission:
    """ASGI middleware. Without a `gate` every caller is admitted, from where a keyless service may be called."""

    def __init__(self, app: ASGIApp, settings: FilterSettings, table: LimitTable, gate: Gate | None = None) -> None:
        self._app = app
        self._settings = settings
        self._table = table
        self._gate = gate
        self._at_work = Shares(1 << 30, settings.max_requests_at_once)
        self._threads = Shares(THREADS, THREADS_OF_ONE)
        self._refusals: dict[str, float] = {}
        # Its own pool, which no route can fill.
        self._pool = ThreadPoolExecutor(8, "admission")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with call_at_work() as call:
            await self._answer(scope, receive, send, call)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, call: Call) -> None:
        limit = self._table.of(scope["method"], scope["path"])
        try:
            principal = await self._admitted(scope, limit)
        except ApiError as error:
            if error.status == 429:
                await self._refuse_slowly(scope["state"]["project"])
            await response_of(error)(scope, receive, send)
            return
        except UNREACHABLE:
            await response_of(unavailable())(scope, receive, send)
            return
        owner = principal.project_id if principal is not None else None
        call.owner = owner
        OWNER.set(owner)
        state = scope["state"]
        state |= {"principal": principal, "project": owner, "threads": self._threads, "gate": self._gate}
        if not self._at_work.take(owner):
            refusal = busy(f"{self._at_work.per_owner} requests of this project are at work; try again.", 1)
            await response_of(refusal)(scope, receive, send)
            return
        try:
            await self._run(scope, receive, send, limit, owner)
        finally:
            self._at_work.give(owner)

    async def _admitted(self, scope: Scope, limit: Limit) -> Principal | None:
        """The caller; None for a path without one. Raises ApiError before the body is read."""
        request, path = HTTPConnection(scope), scope["path"]
        principal = None
        if path not in _PROBES:
            if self._gate is None and not self._settings.authenticated_in_front:
                check_client(request)
            if self._gate is None:
                check_origin(request, scope["method"], self._settings.hosts)
            else:
                principal = await self._blocking(self._entered, request, self._gate)
        if path.startswith(PREFIX) and request.headers.get("content-encoding", "identity") != "identity":
            raise invalid("Compressed bodies are not supported: send it plain.", "content-encoding")
        if limit.kind != "stream" and declared_bytes(request) > limit.bytes:
            raise too_large(f"The body exceeds the limit of {limit.bytes:,} bytes.")
        return principal

    def _entered(self, request: HTTPConnection, gate: Gate) -> Principal | None:
        if gate.keyless():
            check_origin(request, request.scope["method"], self._settings.hosts)
        return gate.admit(request) if request.scope["path"].startswith(PREFIX) else None

    async def _refuse_slowly(self, project: str) -> None:
        """Wait for a refusal's turn: a client that repeats its calls at once would have the service do nothing else."""
        now = asyncio.get_running_loop().time()
        self._refusals = {owner: due for owner, due in self._refusals.items() if due > now}
        due = self._refusals.get(project, now)
        self._refusals[project] = min(due + REFUSAL_SECONDS, now + LONGEST_REFUSAL)
        await asyncio.sleep(due - now)

    async def _run(self, scope: Scope, receive: Receive, send: Send, limit: Limit, owner: str | None) -> None:
        if limit.kind != "stream":
            receive = paced(receive, self._settings.idle_seconds, limit.bytes)
        if limit.kind != "json":
            await self._app(scope, receive, send)
            return
        if scope["method"] in _BODIES:
            try:
                body, complete = await read_json(receive, limit.values)
            except ApiError as error:
                await response_of(error)(scope, receive, send)
                return
            if not complete:
                return
            receive = replay(body, receive)
        if not limit.threaded:
            await self._app(scope, receive, send)
            return
        await self._threads.wait(owner)
        holds = True

        async def released(message: Message) -> None:
            # A client that reads slowly holds no thread.
            nonlocal holds
            if holds:
                holds = False
                self._threads.give(owner)
            await send(message)

        try:
            await self._app(scope, receive, released)
        finally:
            if holds:
                self._threads.give(owner)

    async def _blocking(self, call: Callable[..., T], *args: object) -> T:
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: context.run(call, *args))
