"""Sign-in by key, sessions in a signed cookie, and a token in every form that no other site can know."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from fastapi import Request
from itsdangerous import BadSignature, URLSafeTimedSerializer
from starlette.responses import Response

from reft_ray.api.auth import Authenticator
from reft_ray.api.errors import ApiError
from reft_ray.api.origins import is_loopback
from reft_ray.api.stores import Stores
from reft_ray.jobs.database import service_secret
from reft_ray.jobs.tenants import LOCAL, OWNER, ROLES, Limits, Principal

COOKIE = "reft_session"
ASKED = "reft_sign_in"
SECONDS = 12 * 3600
_LOCAL_KEY = "local"


class SignInNeededError(Exception):
    """The page needs a session; the caller is sent to the sign-in page."""

    def __init__(self, then: str) -> None:
        super().__init__(then)
        self.location = f"/console/sign-in?then={quote(then, safe='/')}"


@dataclass(frozen=True, slots=True)
class Session:
    """Who is signed in, and the token of their forms."""

    principal: Principal
    token: str

    def may(self, scope: str) -> bool:
        """Whether the session has a scope."""
        return scope in self.principal.scopes

    def need(self, scope: str) -> None:
        """Raise ApiError 403 without this scope."""
        if not self.may(scope):
            raise ApiError(403, f"Your role ({self.principal.role}) does not allow this.", code="missing_scope")

    @property
    def is_owner(self) -> bool:
        """Whether this is a customer, who sees their own project only."""
        return self.principal.role == OWNER


class Sessions:
    """Opens and reads sessions. A revoked or expired key ends its sessions at once."""

    def __init__(self, stores: Stores, gate: Authenticator) -> None:
        self._stores = stores
        self._gate = gate
        self._signer = URLSafeTimedSerializer(service_secret(stores.database, "sessions"), salt="console")

    def keyless(self, request: Request) -> bool:
        """Whether this caller may go in without a key: from this machine, to a service that has none."""
        return self._gate.keyless() and (request.client is None or is_loopback(request.client.host))

    def sign_in(self, request: Request, response: Response, secret: str) -> bool:
        """Open a session with a key's secret, or without one on a keyless service; False for a wrong key."""
        if not secret and self.keyless(request):
            self._open(request, response, {"key": _LOCAL_KEY})
            return True
        principal = self._stores.tenants.authenticate(secret.strip())
        if principal is None:
            return False
        self._open(request, response, {"key": principal.key_id})
        self._stores.audit.append("session.created", principal.actor, principal.project_id)
        return True

    def open_for(self, request: Request, response: Response, user: str, role: str) -> None:
        """Open a session for a person whom an identity provider has named."""
        self._open(request, response, {"user": user[:150], "role": role})
        actor = {"type": "session", "session": {"user": user[:150]}}
        self._stores.audit.append("session.created", actor, None, {"role": role})

    def remember(self, request: Request, response: Response, content: Mapping[str, Any]) -> None:
        """Keep values in the browser, signed, while an identity provider is asked."""
        value = self._signer.dumps({"asked": dict(content)})
        secure = request.url.scheme == "https"
        response.set_cookie(ASKED, value, 600, path="/console/oidc", secure=secure, httponly=True, samesite="lax")

    def remembered(self, request: Request) -> Mapping[str, Any]:
        """What `remember` kept. Raises ApiError 400."""
        try:
            return dict(self._signer.loads(request.cookies.get(ASKED, ""), max_age=600)["asked"])
        except (BadSignature, KeyError):
            raise ApiError(400, "This sign-in took too long or began elsewhere: start again.") from None

    def forget(self, response: Response) -> None:
        """Remove what `remember` kept."""
        response.delete_cookie(ASKED, path="/console/oidc")

    def sign_out(self, response: Response) -> None:
        """Remove the cookie."""
        response.delete_cookie(COOKIE, path="/console")

    def required(self, request: Request) -> Session:
        """The session of a request. Raises SignInNeededError."""
        found = self.read(request)
        if found is None:
            raise SignInNeededError(request.url.path)
        return found

    def read(self, request: Request) -> Session | None:
        """The session of a request, if it has a valid one."""
        try:
            content: dict[str, Any] = self._signer.loads(request.cookies.get(COOKIE, ""), max_age=SECONDS)
        except BadSignature:
            return None
        principal = self._principal(request, content)
        return None if principal is None else Session(principal, content["token"])

    def posted(self, request: Request, csrf: str) -> Session:
        """The session of a form. Raises ApiError 403 without its token."""
        session = self.required(request)
        if not hmac.compare_digest(csrf.encode(), session.token.encode()):
            raise ApiError(403, "This form is out of date: reload the page.", code="invalid_csrf_token")
        return session

    def _principal(self, request: Request, content: dict[str, Any]) -> Principal | None:
        if content.get("user"):
            role = content["role"]
            scopes = frozenset(ROLES.get(role, ()))
            return Principal("", "", None, scopes, Limits(), role, content["user"]) if scopes else None
        if content.get("key") == _LOCAL_KEY:
            return LOCAL if self.keyless(request) else None
        return self._stores.tenants.principal(str(content.get("key")))

    def _open(self, request: Request, response: Response, content: dict[str, Any]) -> None:
        value = self._signer.dumps({**content, "token": secrets.token_urlsafe(24)})
        response.set_cookie(
            COOKIE,
            value,
            max_age=SECONDS,
            path="/console",
            secure=request.url.scheme == "https",
            httponly=True,
            samesite="lax",
        )
