"""Authentication, scopes and rate limits of every route under /v1, asked by `admission`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

from fastapi import Depends, Request
from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reft_ray.api.errors import ApiError, not_found
from reft_ray.api.origins import check_client, is_loopback
from reft_ray.core.errors import UsageError
from reft_ray.jobs.database import UNREACHABLE, Database
from reft_ray.jobs.estimate import BYTES_PER_TOKEN
from reft_ray.jobs.rate_limits import Allowance, RateLimits
from reft_ray.jobs.tenants import LOCAL, Principal, Tenants
from reft_ray.telemetry import catalog
from reft_ray.telemetry.recorder import Recorder

Limited = Literal["requests", "tokens", "moderation_tokens"]

_AREAS = {
    "files": "files",
    "uploads": "files",
    "erasures": "files",
    "fine_tuning": "fine_tuning",
    "models": "models",
    "chat": "chat",
    "completions": "chat",
    "moderations": "moderations",
    "screenings": "moderations",
    "teacher": "moderations",
    "webhook_endpoints": "webhooks",
    "reviews": "reviews",
    "appeals": "appeals",
    "releases": "releases",
    "audit": "audit.read",
    "training": "fine_tuning",
}
_TRAINING_PATH, _TRAINING_HEADER, _TRAINING_PREFIX = "/v1/training/", "x-api-key", "tml-"
"""The training client has its own header, and takes no key without this prefix: it is put in front of ours."""
_TRAINING_READS = ("client/config", "client/dynamic_config", "telemetry", "get_info", "weights_info")
_SPLIT = ("files", "fine_tuning", "models", "reviews", "appeals", "releases")
"""Areas with separate read and write scopes."""


class Keys(Protocol):
    """Where keys and limits are recorded: `api.stores.Stores`, or `FilterKeys`."""

    @property
    def tenants(self) -> Tenants:
        """The keys."""
        ...

    @property
    def rate_limits(self) -> RateLimits:
        """What the projects have used."""
        ...

    @property
    def require_keys(self) -> bool:
        """Whether every caller needs a key, also before any exists."""
        ...


@dataclass(frozen=True, slots=True)
class FilterKeys:
    """The keys and limits of a filter without the finetuning service. Every caller needs one."""

    tenants: Tenants
    rate_limits: RateLimits
    require_keys: bool = True

    @classmethod
    def of(cls, database: Database) -> FilterKeys:
        """Those of a database."""
        return cls(Tenants(database), RateLimits(database))


class Authenticator:
    """The Gate of a service with keys: a caller's key, scope and requests per minute, from the headers alone."""

    def __init__(self, keys: Keys, recorder: Recorder) -> None:
        self._keys = keys
        self._recorder = recorder
        # A key that was made once keeps the service from being keyless, also after it was revoked.
        self._has_keys = keys.require_keys

    def keyless(self) -> bool:
        """Whether the service answers without keys: none was ever made, and the operator requires none."""
        self._has_keys = self._has_keys or self._keys.tenants.any_keys()
        return not self._has_keys

    def admit(self, request: HTTPConnection) -> Principal:
        """The caller. Raises ApiError 401, 403 or 429."""
        principal = self._principal(request)
        method = str(request.scope["method"])
        scope = scope_of(method, request.scope["path"])
        if scope is None:
            # Also for a route without a scope, which would be a mistake.
            raise not_found(f"Unknown request URL: {method} {request.scope['path'][:200]}", None, "unknown_url")
        if scope not in principal.scopes:
            raise ApiError(
                403,
                f"You have insufficient permissions for this operation. Missing scopes: {scope}.",
                code="insufficient_permissions",
            )
        if principal.key_id is not None:
            request.scope["state"]["project"] = principal.project_id
            try:
                take(self._keys.rate_limits, request, "requests", 1, principal, self._recorder)
            except UNREACHABLE:
                # Reading continues where nothing can be written, such as on a full disk.
                if method not in ("GET", "HEAD"):
                    raise
        return principal

    def charge(self, request: HTTPConnection, principal: Principal, texts: int) -> None:
        """Charge the tokens of `texts` bytes that the teacher is to read. Raises ApiError 429."""
        if principal.key_id is not None:
            cost = math.ceil(texts / BYTES_PER_TOKEN)
            take(self._keys.rate_limits, request, "moderation_tokens", cost, principal, self._recorder)

    def _principal(self, request: HTTPConnection) -> Principal:
        scheme, _, secret = request.headers.get("authorization", "").partition(" ")
        if (other := request.headers.get(_TRAINING_HEADER)) and request.scope["path"].startswith(_TRAINING_PATH):
            scheme, secret = "bearer", other.removeprefix(_TRAINING_PREFIX)
        if secret and scheme.lower() == "bearer":
            principal = self._keys.tenants.authenticate(secret.strip())
            if principal is not None:
                return _in_project(principal, request)
        if self.keyless():
            check_client(request)
            return LOCAL
        message = "Incorrect API key provided." if secret else "You didn't provide an API key."
        raise ApiError(401, f"{message} Use `Authorization: Bearer sk-reft-...`.", code="invalid_api_key")


def current(request: Request) -> Principal:
    """The principal that `Admission` set."""
    principal = request.state.principal
    if not isinstance(principal, Principal):
        raise TypeError("the route runs without admission")
    return principal


Caller = Annotated[Principal, Depends(current)]


def take(
    rate_limits: RateLimits,
    request: HTTPConnection,
    name: Limited,
    cost: float,
    principal: Principal,
    recorder: Recorder,
) -> None:
    """Take from the project's requests or tokens per minute. Raises ApiError 429 when too few are left."""
    per_minute = int(getattr(principal.limits, f"{name}_per_minute"))
    allowance = rate_limits.take(principal.project_id, name, cost, per_minute)
    headers = request.scope["state"].setdefault("ratelimit", {})
    headers |= _headers(name, allowance)
    if allowance.allowed:
        return
    recorder.count(catalog.RATE_LIMITED, limit=name)
    asked = f"Limit {per_minute}, used {per_minute - allowance.remaining}, requested {math.ceil(cost)}."
    if math.isinf(allowance.wait):
        raise ApiError(
            429,
            f"Request too large for the limit of {name} per minute. {asked} Reduce the request.",
            type=name,
            code="rate_limit_exceeded",
            headers={"x-should-retry": "false"},
        )
    wait = max(1, math.ceil(allowance.wait))
    raise ApiError(
        429,
        f"Rate limit reached for {name} per minute. {asked} Please try again in {wait}s.",
        type=name,
        code="rate_limit_exceeded",
        headers={"retry-after": str(wait), "retry-after-ms": str(math.ceil(allowance.wait * 1000))},
    )


class RateLimitHeaders:
    """ASGI middleware: adds the headers that `take` stored to every response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in scope.get("state", {}).get("ratelimit", {}).items():
                    headers[name] = value
            await send(message)

        await self._app(scope, receive, with_headers)


def check_bind(host: str, has_keys: bool, remedy: str) -> None:
    """Refuse to listen beyond loopback without API keys. Raises UsageError; called before the server binds."""
    if not has_keys and not is_loopback(host):
        raise UsageError(
            f"host {host!r}: without API keys the service answers on loopback only; {remedy}, or bind to 127.0.0.1"
        )


def scope_of(method: str, path: str) -> str | None:
    """The scope that a request needs; None for an unknown path."""
    area = _AREAS.get(path.removeprefix("/v1/").split("/")[0])
    if path.removeprefix(f"{_TRAINING_PATH}api/v1/") in _TRAINING_READS:
        return f"{area}.read"
    if area in _SPLIT:
        return f"{area}.{'read' if method in ('GET', 'HEAD') else 'write'}"
    return area


def _in_project(principal: Principal, request: HTTPConnection) -> Principal:
    for header, actual in (
        ("openai-organization", principal.organization_id),
        ("openai-project", principal.project_id),
    ):
        asked = request.headers.get(header)
        if asked is not None and asked != actual:
            raise ApiError(401, f"The API key does not belong to {header} {asked[:64]!r}.", code=f"mismatched_{header}")
    return principal


def _headers(name: str, allowance: Allowance) -> dict[str, str]:
    name = name.replace("_", "-")
    return {
        f"x-ratelimit-limit-{name}": str(allowance.limit),
        f"x-ratelimit-remaining-{name}": str(allowance.remaining),
        f"x-ratelimit-reset-{name}": f"{allowance.reset_seconds:.3f}s",
    }
