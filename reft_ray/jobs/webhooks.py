"""Webhooks: recorded with the change that they report, delivered later, signed for the `openai` client."""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import json
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import Connection, delete, insert, select, update

from reft_ray.jobs import ids
from reft_ray.jobs.database import Database
from reft_ray.jobs.errors import InvalidError, NotFoundError
from reft_ray.jobs.tables import webhook_deliveries, webhook_endpoints

EVENTS = ("fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled")
RETRY_SECONDS = (5, 30, 120, 600, 3600, 6 * 3600, 24 * 3600)
"""Waits between attempts; after the last one the delivery is abandoned."""

Post = Callable[[str, bytes, Mapping[str, str]], int]
"""Sends a body and returns the HTTP status. Raises OSError when the endpoint cannot be reached."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A URL that receives a project's events. Its secret signs them; it is shown once, at its creation."""

    id: str
    project_id: str
    url: str
    secret: str
    events: Sequence[str]
    created_at: float


_COLUMNS = [webhook_endpoints.c[name] for name in Endpoint.__dataclass_fields__]


def enqueue(connection: Connection, now: float, project_id: str, kind: str, object_id: str) -> None:
    """Record one delivery per subscribed endpoint, in the transaction of the change."""
    event_id = ids.new_id(ids.WEBHOOK_EVENT)
    endpoints = connection.execute(select(*_COLUMNS).where(webhook_endpoints.c.project_id == project_id)).all()
    for endpoint in (Endpoint(*row) for row in endpoints):
        if kind in endpoint.events:
            connection.execute(
                insert(webhook_deliveries).values(
                    event_id=event_id,
                    endpoint_id=endpoint.id,
                    type=kind,
                    object_id=object_id,
                    created_at=now,
                    next_at=now,
                    attempts=0,
                )
            )


def sign(secret: str, message_id: str, timestamp: int, body: bytes) -> str:
    """The `webhook-signature` header of Standard Webhooks, which `client.webhooks.unwrap` verifies."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    digest = hmac.new(key, f"{message_id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return "v1," + base64.b64encode(digest).decode()


class Webhooks:
    """Endpoints and their deliveries. `allow_private` permits addresses inside the operator's network."""

    def __init__(self, database: Database, allow_private: bool = False) -> None:
        self.database = database
        self.allow_private = allow_private

    def add(self, project_id: str, url: str, events: Sequence[str] = EVENTS) -> Endpoint:
        """Register an endpoint with a new secret. Raises InvalidError."""
        unknown = [event for event in events if event not in EVENTS]
        if unknown or not events:
            raise InvalidError(f"events: {unknown or 'empty'}; choose from {', '.join(EVENTS)}.", "events")
        self.check_address(url)
        secret = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()
        endpoint = Endpoint(ids.new_id(ids.ENDPOINT), project_id, url, secret, list(events), self.database.now())
        with self.database.write() as connection:
            connection.execute(
                insert(webhook_endpoints).values(
                    {name: getattr(endpoint, name) for name in Endpoint.__dataclass_fields__}
                )
            )
        return endpoint

    def list(self, project_id: str) -> list[Endpoint]:
        """A project's endpoints, oldest first."""
        query = select(*_COLUMNS).where(webhook_endpoints.c.project_id == project_id)
        with self.database.read() as connection:
            return [Endpoint(*row) for row in connection.execute(query.order_by(webhook_endpoints.c.created_at))]

    def remove(self, endpoint_id: str, project_id: str) -> None:
        """Delete an endpoint and its pending deliveries. Raises NotFoundError."""
        mine = (webhook_endpoints.c.id == endpoint_id) & (webhook_endpoints.c.project_id == project_id)
        with self.database.write() as connection:
            if connection.execute(select(webhook_endpoints.c.id).where(mine)).first() is None:
                raise NotFoundError("webhook endpoint", endpoint_id)
            connection.execute(delete(webhook_deliveries).where(webhook_deliveries.c.endpoint_id == endpoint_id))
            connection.execute(delete(webhook_endpoints).where(mine))

    def deliver(self, post: Post) -> int:
        """Send the due webhooks; returns the number delivered. Each is claimed first, so gateways share the work."""
        done = 0
        query = select(webhook_deliveries).where(webhook_deliveries.c.next_at <= self.database.now())
        with self.database.read() as connection:
            due = connection.execute(query.order_by(webhook_deliveries.c.seq).limit(100)).all()
        for delivery in due:
            if self._claim(delivery):
                done += self._send(delivery, post)
        return done

    def check_address(self, url: str) -> None:
        """Raise InvalidError for an address inside the operator's network (server-side request forgery)."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
            (host or "").encode("idna")  # the resolver does the same, and fails with UnicodeError
        except ValueError:
            raise InvalidError("url: its host name or its port is malformed.", "url") from None
        if parts.scheme not in ("https", "http") or not host:
            raise InvalidError("url must be an http(s) URL.", "url")
        if self.allow_private:
            return
        if parts.scheme != "https":
            raise InvalidError("url must be https.", "url")
        try:
            found = {info[4][0] for info in socket.getaddrinfo(host, port or 443)}
        except (OSError, ValueError):
            raise InvalidError("url: its host name cannot be resolved.", "url") from None
        if any(not ipaddress.ip_address(str(address).split("%")[0]).is_global for address in found):
            raise InvalidError("url must be a public address.", "url")

    def _claim(self, delivery: Any) -> bool:
        attempts = delivery.attempts + 1
        wait = RETRY_SECONDS[delivery.attempts] if delivery.attempts < len(RETRY_SECONDS) else None
        statement = (
            update(webhook_deliveries)
            .where(webhook_deliveries.c.seq == delivery.seq, webhook_deliveries.c.attempts == delivery.attempts)
            .values(attempts=attempts, next_at=None if wait is None else self.database.now() + wait)
        )
        with self.database.write() as connection:
            return bool(connection.execute(statement).rowcount)

    def _send(self, delivery: Any, post: Post) -> bool:
        with self.database.read() as connection:
            row = connection.execute(select(*_COLUMNS).where(webhook_endpoints.c.id == delivery.endpoint_id)).first()
        if row is None:
            return False
        endpoint = Endpoint(*row)
        body = payload(delivery.event_id, delivery.type, delivery.object_id, delivery.created_at)
        timestamp = int(self.database.now())
        headers = {
            "content-type": "application/json",
            "webhook-id": delivery.event_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": sign(endpoint.secret, delivery.event_id, timestamp, body),
        }
        try:
            # Checked again: the name may resolve to another address than at its registration.
            self.check_address(endpoint.url)
            status = post(endpoint.url, body, headers)
        except (OSError, InvalidError):
            return False
        delivered = 200 <= status < 300
        values: dict[str, Any] = {"status_code": status}
        if delivered:
            values |= {"delivered_at": self.database.now(), "next_at": None}
        with self.database.write() as connection:
            connection.execute(
                update(webhook_deliveries).where(webhook_deliveries.c.seq == delivery.seq).values(**values)
            )
        return delivered


def payload(event_id: str, kind: str, object_id: str, created_at: float) -> bytes:
    """The body of a delivery, identical at every attempt."""
    event = {"id": event_id, "object": "event", "created_at": int(created_at), "type": kind, "data": {"id": object_id}}
    return json.dumps(event, separators=(",", ":")).encode()
