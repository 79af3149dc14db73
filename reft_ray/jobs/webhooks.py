"""Webhooks: recorded with the change that they report, delivered later, signed for the `openai` client."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, delete, func, insert, join, select, update

from reft_ray.jobs import ids
from reft_ray.jobs.addresses import check_url, public_address
from reft_ray.jobs.audit import AuditLog
from reft_ray.jobs.database import Database
from reft_ray.jobs.errors import InvalidError, NotFoundError
from reft_ray.jobs.tables import webhook_deliveries, webhook_endpoints

EVENTS = ("fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled")
RETRY_SECONDS = (5, 30, 120, 600, 3600, 6 * 3600, 24 * 3600)
"""Waits between attempts; after the last one the delivery is abandoned."""

PUT_OFF_SECONDS = 3600.0
"""The longest that a failing endpoint is put off."""

DISABLE_SECONDS = 5 * 86400.0
"""An endpoint that failed for this long gets no more deliveries until it is registered again."""

MAX_ENDPOINTS = 10
"""Per project."""

WORKERS = 16
"""Projects that are served at once."""

TURN_SECONDS = 2.0

Post = Callable[[str, bytes, Mapping[str, str], str | None], int]
"""Sends a body to a URL, by the given address where there is one, and returns the HTTP status. Raises OSError when the
endpoint cannot be reached."""

SYSTEM: Mapping[str, Any] = {"type": "service"}
_JOINED = join(webhook_deliveries, webhook_endpoints, webhook_deliveries.c.endpoint_id == webhook_endpoints.c.id)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A URL that receives a project's events. Its secret signs them; it is shown once, at its creation."""

    id: str
    project_id: str
    url: str
    secret: str
    events: Sequence[str]
    created_at: float
    disabled_at: float | None


_COLUMNS = [webhook_endpoints.c[name] for name in Endpoint.__dataclass_fields__]


def enqueue(connection: Connection, now: float, project_id: str, kind: str, object_id: str) -> None:
    """Record one delivery per subscribed endpoint, in the transaction of the change."""
    event_id = ids.new_id(ids.WEBHOOK_EVENT)
    endpoints = connection.execute(select(*_COLUMNS).where(webhook_endpoints.c.project_id == project_id)).all()
    for endpoint in (Endpoint(*row) for row in endpoints):
        if kind in endpoint.events and endpoint.disabled_at is None:
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
        self.audit = AuditLog(database)

    def add(
        self, project_id: str, url: str, events: Sequence[str] = EVENTS, actor: Mapping[str, Any] | None = None
    ) -> Endpoint:
        """Register an endpoint with a new secret. Its name is resolved at each delivery. Raises InvalidError."""
        unknown = [event for event in events if event not in EVENTS]
        if unknown or not events:
            raise InvalidError(f"events: {unknown or 'empty'}; choose from {', '.join(EVENTS)}.", "events")
        check_url(url, self.allow_private)
        secret = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()
        endpoint = Endpoint(ids.new_id(ids.ENDPOINT), project_id, url, secret, list(events), self.database.now(), None)
        mine = webhook_endpoints.c.project_id == project_id
        with self.database.write() as connection:
            self.database.serialize(connection, f"webhooks of {project_id}")
            if connection.execute(select(func.count()).where(mine)).scalar_one() >= MAX_ENDPOINTS:
                raise InvalidError(f"A project has up to {MAX_ENDPOINTS} endpoints; delete one.", "url", "too_many")
            connection.execute(
                insert(webhook_endpoints).values(
                    {name: getattr(endpoint, name) for name in Endpoint.__dataclass_fields__} | {"failures": 0}
                )
            )
            if actor is not None:
                self.audit.append_in(connection, "webhook_endpoint.created", actor, project_id, {"id": endpoint.id})
        return endpoint

    def list(self, project_id: str) -> list[Endpoint]:
        """A project's endpoints, oldest first."""
        query = select(*_COLUMNS).where(webhook_endpoints.c.project_id == project_id)
        with self.database.read() as connection:
            return [Endpoint(*row) for row in connection.execute(query.order_by(webhook_endpoints.c.created_at))]

    def remove(self, endpoint_id: str, project_id: str, actor: Mapping[str, Any] | None = None) -> None:
        """Delete an endpoint and its pending deliveries. Raises NotFoundError."""
        mine = (webhook_endpoints.c.id == endpoint_id) & (webhook_endpoints.c.project_id == project_id)
        with self.database.write() as connection:
            if connection.execute(select(webhook_endpoints.c.id).where(mine)).first() is None:
                raise NotFoundError("webhook endpoint", endpoint_id)
            connection.execute(delete(webhook_deliveries).where(webhook_deliveries.c.endpoint_id == endpoint_id))
            connection.execute(delete(webhook_endpoints).where(mine))
            if actor is not None:
                self.audit.append_in(connection, "webhook_endpoint.deleted", actor, project_id, {"id": endpoint_id})

    def deliver(self, post: Post) -> int:
        """Send the due webhooks; returns the number delivered. Each is claimed first, so gateways share the work.

        Projects are served side by side, each one delivery at a time and for TURN_SECONDS at most: an endpoint that
        keeps its connection open delays its own project.
        """
        first = func.min(webhook_deliveries.c.next_at)
        query = select(webhook_endpoints.c.project_id).select_from(_JOINED).where(self._due())
        with self.database.read() as connection:
            due = query.group_by(webhook_endpoints.c.project_id).order_by(first)
            projects = list(connection.execute(due).scalars())
        with ThreadPoolExecutor(WORKERS, "webhooks") as pool:
            return sum(pool.map(lambda project: self._turn(project, post), projects))

    def _turn(self, project_id: str, post: Post) -> int:
        mine = select(webhook_deliveries).select_from(_JOINED).where(webhook_endpoints.c.project_id == project_id)
        until, done = time.monotonic() + TURN_SECONDS, 0
        while time.monotonic() < until:
            with self.database.read() as connection:
                delivery = connection.execute(
                    mine.where(self._due()).order_by(webhook_deliveries.c.seq).limit(1)
                ).first()
            if delivery is None:
                break
            if self._claim(delivery):
                done += self._send(delivery, post)
        return done

    def _due(self) -> ColumnElement[bool]:
        now, endpoint = self.database.now(), webhook_endpoints.c
        put_off = endpoint.retry_at.is_(None) | (endpoint.retry_at <= now)
        return (webhook_deliveries.c.next_at <= now) & endpoint.disabled_at.is_(None) & put_off

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
        status, delivered = None, False
        try:
            host, port = check_url(endpoint.url, self.allow_private)
            # Resolved now, and connected to by number: a second look-up may have another answer.
            address = None if self.allow_private else public_address(host, port)
            status = post(endpoint.url, body, headers, address)
            delivered = 200 <= status < 300
        except (OSError, InvalidError):
            pass
        values: dict[str, Any] = {"status_code": status}
        if delivered:
            values |= {"delivered_at": self.database.now(), "next_at": None}
        with self.database.write() as connection:
            connection.execute(
                update(webhook_deliveries).where(webhook_deliveries.c.seq == delivery.seq).values(**values)
            )
            self._judge(connection, endpoint, delivered)
        return delivered

    def _judge(self, connection: Connection, endpoint: Endpoint, delivered: bool) -> None:
        """Put off an endpoint that failed, all its deliveries with it; disable one that failed for DISABLE_SECONDS."""
        mine, now = webhook_endpoints.c.id == endpoint.id, self.database.now()
        state = connection.execute(select(webhook_endpoints).where(mine).with_for_update()).first()
        if state is None:
            return
        values: dict[str, Any] = {"failures": 0, "failing_since": None, "retry_at": None}
        if not delivered:
            since = state.failing_since or now
            wait = min(RETRY_SECONDS[min(state.failures, len(RETRY_SECONDS) - 1)], PUT_OFF_SECONDS)
            values = {"failures": state.failures + 1, "failing_since": since, "retry_at": now + wait}
            if now - since >= DISABLE_SECONDS:
                values["disabled_at"] = now
                entry = {"id": endpoint.id, "failing_since": since}
                self.audit.append_in(connection, "webhook_endpoint.disabled", SYSTEM, endpoint.project_id, entry)
        connection.execute(update(webhook_endpoints).where(mine).values(**values))


def payload(event_id: str, kind: str, object_id: str, created_at: float) -> bytes:
    """The body of a delivery, identical at every attempt."""
    event = {"id": event_id, "object": "event", "created_at": int(created_at), "type": kind, "data": {"id": object_id}}
    return json.dumps(event, separators=(",", ":")).encode()
