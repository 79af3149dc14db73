"""Which addresses a webhook may reach: public ones, by the number that was checked."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

from reft_ray.jobs.errors import InvalidError

# Global unicast (RFC 4291) without what carries an IPv4 address: 6to4 and Teredo. `is_global` takes those, NAT64,
# site-local and multicast addresses as public in some versions of Python.
_UNICAST = ipaddress.ip_network("2000::/3")
_TUNNELS = tuple(map(ipaddress.ip_network, ("2002::/16", "2001::/32")))


def is_public(address: str) -> bool:
    """Whether a numeric address is one of the public internet."""
    try:
        number = ipaddress.ip_address(address.split("%")[0])
    except ValueError:
        return False
    if not number.is_global or number.is_multicast or number.is_reserved:
        return False
    return number.version == 4 or (number in _UNICAST and not any(number in net for net in _TUNNELS))


def check_url(url: str, allow_private: bool = False) -> tuple[str, int]:
    """Host and port of an https URL whose host may be public. Resolves no name. Raises InvalidError."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        host.encode("idna")  # the resolver does the same, and fails with UnicodeError
    except ValueError:
        raise InvalidError("url: its host name or its port is malformed.", "url") from None
    if parts.scheme not in ("https", "http") or not host:
        raise InvalidError("url must be an http(s) URL.", "url")
    port = port or (443 if parts.scheme == "https" else 80)
    if allow_private:
        return host, port
    if parts.scheme != "https":
        raise InvalidError("url must be https.", "url")
    if (_is_number(host) and not is_public(host)) or host == "localhost" or host.endswith(".localhost"):
        raise InvalidError("url must be a public address.", "url")
    return host, port


def public_address(host: str, port: int) -> str:
    """Resolve a name, to the address to connect to. Raises InvalidError unless all its addresses are public."""
    try:
        found = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except (OSError, ValueError):
        raise InvalidError("url: its host name cannot be resolved.", "url") from None
    if not found or not all(map(is_public, found)):
        raise InvalidError("url must be a public address.", "url")
    return found[0]


def _is_number(host: str) -> bool:
    """Whether the host is an address in any notation that the system takes, such as 0x7f.1, which needs no resolver."""
    try:
        socket.getaddrinfo(host, None, flags=socket.AI_NUMERICHOST)
    except (OSError, ValueError):
        return False
    return True
