"""Which browsers may call a service without keys: none on behalf of another site.

Without this any web page could use a service on loopback, by a name that resolves to 127.0.0.1 or by a plain form.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

from reft_ray.api.errors import ApiError

ANY = "*"


def check_origin(request: HTTPConnection, method: str, hosts: Sequence[str] = ()) -> None:
    """Raise ApiError 403 unless the host is loopback or one of `hosts`, and the page that calls is of the same host."""
    names = [host_of(value) for value in request.headers.getlist("host")]
    if len(names) != 1 or not (ANY in hosts or is_loopback(names[0]) or names[0] in hosts):
        raise _refused(
            f"Host {', '.join(map(repr, names))[:100]}: without API keys the service answers to loopback's names. "
            "Make a key with `reft-ray keys create`, or allow the name in `filter.hosts`."
        )
    origins = request.headers.getlist("origin")
    if any(host_of(urlsplit(origin).netloc if "://" in origin else "") != names[0] for origin in origins):
        raise _refused("Without API keys the service takes no calls from pages of another origin.")
    navigates = method in ("GET", "HEAD") and request.headers.get("sec-fetch-mode") == "navigate"
    if request.headers.get("sec-fetch-site") == "cross-site" and not (navigates and not _is_api(request)):
        raise _refused("Without API keys the service takes no calls from pages of another site.")


def check_client(request: HTTPConnection) -> None:
    """Raise ApiError 401 for a client beyond loopback: whatever started the service may have bound a public address."""
    if request.client is not None and not is_loopback(request.client.host):
        raise ApiError(401, "This service has no API keys and answers on loopback only.", code="invalid_api_key")


def host_of(value: str) -> str:
    """The name in a Host header or in the authority of an origin, without port and brackets; empty if malformed."""
    try:
        parts = urlsplit(f"//{value}")
        parts.port  # noqa: B018 - raises ValueError
        return "" if parts.path or "@" in value else parts.hostname or ""
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_api(request: HTTPConnection) -> bool:
    return str(request.scope["path"]).startswith("/v1")


def _refused(message: str) -> ApiError:
    return ApiError(403, message, code="origin_not_allowed")
