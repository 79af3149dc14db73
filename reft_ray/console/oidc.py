"""Sign-in through an identity provider: OpenID Connect's code flow with PKCE, by Authlib (extra `oidc`)."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from typing import Any

import httpx

from reft_ray.api.errors import ApiError
from reft_ray.api.settings import OidcSettings
from reft_ray.core.errors import UsageError

ALGORITHMS = ["RS256", "ES256", "PS256"]
SECONDS = 10.0


class OpenIdProvider:
    """One provider. A person's role is the first of `settings.roles` that their `role_claim` names."""

    def __init__(self, settings: OidcSettings) -> None:
        try:
            import authlib  # noqa: F401
        except ImportError:
            raise UsageError("service.oidc needs Authlib; install the extra 'oidc'") from None
        self.name = settings.name
        self._settings = settings
        variable = settings.client_secret_variable
        if variable is not None and variable not in os.environ:
            raise UsageError(f"service.oidc.client_secret_variable: {variable} is not set")
        self._secret = os.environ[variable] if variable is not None else None

    async def start(self, callback: str) -> tuple[str, Mapping[str, Any]]:
        """The provider's address for a browser, and what to remember until it returns."""
        found = await self._discover()
        verifier, nonce = secrets.token_urlsafe(48), secrets.token_urlsafe(24)
        async with self._client(callback) as client:
            address, state = client.create_authorization_url(
                found["authorization_endpoint"], code_verifier=verifier, nonce=nonce
            )
        return address, {"state": state, "verifier": verifier, "nonce": nonce}

    async def finish(self, callback: str, address: str, remembered: Mapping[str, Any]) -> tuple[str, str]:
        """The person's name and role. Raises ApiError 403 for one without a role, 400 where the provider refuses."""
        from authlib.common.errors import AuthlibBaseError
        from joserfc.errors import JoseError

        try:
            found = await self._discover()
            async with self._client(callback) as client:
                token = await client.fetch_token(
                    found["token_endpoint"],
                    authorization_response=address,
                    code_verifier=remembered["verifier"],
                    state=remembered["state"],
                )
                keys = (await client.request("GET", found["jwks_uri"], withhold_token=True)).json()
            claims = self._claims(token["id_token"], keys, remembered["nonce"])
        except (AuthlibBaseError, JoseError, httpx.HTTPError, KeyError, ValueError):
            raise ApiError(400, f"{self.name} did not confirm this sign-in: start again.") from None
        return str(claims.get("email") or claims["sub"]), self._role(claims)

    def _claims(self, token: str, keys: Any, nonce: str) -> dict[str, Any]:
        from joserfc import jwt
        from joserfc.jwk import KeySet

        decoded = jwt.decode(token, KeySet.import_key_set(keys), algorithms=ALGORITHMS)
        rules = jwt.JWTClaimsRegistry(
            iss={"essential": True, "value": self._settings.issuer},
            aud={"essential": True, "value": self._settings.client_id},
            exp={"essential": True},
            nonce={"essential": True, "value": nonce},
            sub={"essential": True},
        )
        rules.validate(decoded.claims)
        return dict(decoded.claims)

    def _role(self, claims: Mapping[str, Any]) -> str:
        given = claims.get(self._settings.role_claim, [])
        names = {given} if isinstance(given, str) else set(map(str, given))
        for name, role in self._settings.roles.items():
            if name in names:
                return role
        raise ApiError(403, "Your account has no role here: ask the operator.")

    async def _discover(self) -> dict[str, Any]:
        async with httpx.AsyncClient(timeout=SECONDS) as client:
            answer = await client.get(f"{self._settings.issuer.rstrip('/')}/.well-known/openid-configuration")
            answer.raise_for_status()
            found: dict[str, Any] = answer.json()
        return found

    def _client(self, callback: str) -> Any:
        from authlib.integrations.httpx_client import AsyncOAuth2Client

        return AsyncOAuth2Client(
            self._settings.client_id,
            self._secret,
            scope="openid email profile",
            redirect_uri=callback,
            code_challenge_method="S256",
            timeout=SECONDS,
        )
