"""Who may call the proxy: the holder of its own key, or the callers that the upstream admits."""

from __future__ import annotations

import hashlib
import hmac
import time
from dataclasses import replace
from threading import Lock

import httpx
from starlette.requests import HTTPConnection

from reft_ray.api.errors import ApiError
from reft_ray.jobs.tenants import LOCAL, Principal
from reft_ray.proxy.upstream import CREDENTIALS, unanswered

CHECKED_SECONDS = 60.0
MOST_KNOWN = 10_000


class KeyGate:
    """`api.admission.Gate` with one key for all clients, for an upstream key that is the operator's."""

    def __init__(self, key: str) -> None:
        self._key = key.encode()

    def keyless(self) -> bool:
        return False

    def admit(self, request: HTTPConnection) -> Principal:
        scheme, _, secret = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(secret.strip().encode(), self._key):
            raise _refused()
        return LOCAL

    def charge(self, request: HTTPConnection, principal: Principal, texts: int) -> None:
        """Nothing is charged here."""


class UpstreamGate:
    """`api.admission.Gate` that asks the upstream for its models with the client's key, once in CHECKED_SECONDS."""

    def __init__(self, upstream: str) -> None:
        self._url = f"{upstream.rstrip('/')}/models"
        self._client = httpx.Client(timeout=10.0)
        self._known: dict[str, tuple[float, bool]] = {}
        self._lock = Lock()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def keyless(self) -> bool:
        """Whether the upstream admits calls without a key: then only this machine may call."""
        return self._admits({})

    def admit(self, request: HTTPConnection) -> Principal:
        headers = {name: request.headers[name] for name in CREDENTIALS if name in request.headers}
        if not self._admits(headers):
            raise _refused()
        return replace(LOCAL, project_id=f"proj_{_name(headers)[:24]}")

    def charge(self, request: HTTPConnection, principal: Principal, texts: int) -> None:
        """Nothing is charged here."""

    def _admits(self, headers: dict[str, str]) -> bool:
        name, now = _name(headers), time.monotonic()
        with self._lock:
            until, admitted = self._known.get(name, (0.0, False))
            if until > now:
                return admitted
        try:
            status = self._client.get(self._url, headers=headers).status_code
        except httpx.HTTPError as error:
            raise unanswered(error) from None
        with self._lock:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[name] = (now + CHECKED_SECONDS, status == 200)
        return status == 200


def _name(headers: dict[str, str]) -> str:
    return hashlib.sha256(repr(sorted(headers.items())).encode()).hexdigest()


def _refused() -> ApiError:
    return ApiError(401, "Incorrect API key provided.", code="invalid_api_key")
