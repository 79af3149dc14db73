"""The audit log: append-only, each entry hashed together with the hash of the one before it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, insert, select, update

from reft_ray.jobs import ids
from reft_ray.jobs.database import Database
from reft_ray.jobs.tables import audit_head, audit_log

GENESIS = "0" * 64


@dataclass(frozen=True, slots=True)
class Entry:
    """Who did what: `type` is `noun.verb`; `data` holds ids and settings, never row texts."""

    seq: int
    id: str
    effective_at: float
    type: str
    actor: Mapping[str, Any]
    project_id: str | None
    data: Mapping[str, Any]
    previous: str
    hash: str

    def digest(self) -> str:
        """SHA-256 over all fields except `hash`, as canonical JSON."""
        content = [
            self.seq,
            self.id,
            self.effective_at,
            self.type,
            self.actor,
            self.project_id,
            self.data,
            self.previous,
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of a check: number of entries, hash of the last one, and the first fault, if any."""

    entries: int
    head: str
    fault: str | None


_COLUMNS = [audit_log.c[name] for name in Entry.__dataclass_fields__]


class AuditLog:
    """Append and verify. Keep `verify().head` elsewhere: with it a truncated log is detected."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def append(
        self, kind: str, actor: Mapping[str, Any], project_id: str | None = None, data: Mapping[str, Any] | None = None
    ) -> Entry:
        """Add an entry at the end of the chain."""
        with self.database.write() as connection:
            return self.append_in(connection, kind, actor, project_id, data)

    def append_in(
        self,
        connection: Connection,
        kind: str,
        actor: Mapping[str, Any],
        project_id: str | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> Entry:
        """`append`, in the transaction of the recorded change."""
        self.database.serialize(connection, "audit")
        head = connection.execute(select(audit_head.c.seq, audit_head.c.hash)).first()
        seq, previous = (0, GENESIS) if head is None else (head.seq, head.hash)
        # Through JSON and back, so that the hash is of exactly what a reader gets.
        fields = json.loads(json.dumps({"actor": dict(actor), "data": dict(data or {})}))
        entry = Entry(
            seq=seq + 1,
            id=ids.new_id(ids.AUDIT),
            effective_at=self.database.now(),
            type=kind,
            actor=fields["actor"],
            project_id=project_id,
            data=fields["data"],
            previous=previous,
            hash="",
        )
        values = {name: getattr(entry, name) for name in Entry.__dataclass_fields__} | {"hash": entry.digest()}
        connection.execute(insert(audit_log).values(values))
        new_head = {"seq": values["seq"], "hash": values["hash"]}
        connection.execute(
            insert(audit_head).values(id=1, **new_head) if head is None else update(audit_head).values(new_head)
        )
        return Entry(**values)

    def entries(
        self, after: int = 0, limit: int = 1000, kind: str | None = None, project_id: str | None = None
    ) -> list[Entry]:
        """Entries after sequence number `after`, oldest first, optionally of one type or project."""
        with self.database.read() as connection:
            return _entries(connection, after, limit, kind, project_id)

    def verify(self, head: str | None = None) -> Verification:
        """Recompute the whole chain; a `head` of an earlier verification must still be in it."""
        count, previous, seen = 0, GENESIS, head in (None, GENESIS)
        # One snapshot: an entry that is added between two reads is not a missing one.
        with self.database.snapshot() as connection:
            stored = connection.execute(select(audit_head.c.seq, audit_head.c.hash)).first()
            for entry in _all(connection):
                fault = _fault(entry, count + 1, previous)
                if fault is not None:
                    return Verification(count, previous, fault)
                count, previous = entry.seq, entry.hash
                seen = seen or entry.hash == head
        expected = None if count == 0 else (count, previous)
        if (stored if stored is None else tuple(stored)) != expected:
            return Verification(count, previous, f"entries after {count} are missing")
        return Verification(count, previous, None if seen else f"the remembered head {head} is not in the chain")


def _entries(
    connection: Connection, after: int, limit: int = 1000, kind: str | None = None, project_id: str | None = None
) -> list[Entry]:
    query = select(*_COLUMNS).where(audit_log.c.seq > after).order_by(audit_log.c.seq).limit(limit)
    for column, value in ((audit_log.c.type, kind), (audit_log.c.project_id, project_id)):
        if value is not None:
            query = query.where(column == value)
    return [Entry(*row) for row in connection.execute(query)]


def _all(connection: Connection) -> Iterator[Entry]:
    after = 0
    while entries := _entries(connection, after):
        yield from entries
        after = entries[-1].seq


def _fault(entry: Entry, seq: int, previous: str) -> str | None:
    if entry.seq != seq:
        return f"entry {seq} is missing"
    if entry.previous != previous:
        return f"entry {seq} does not follow the one before it"
    if entry.digest() != entry.hash:
        return f"entry {seq} ({entry.id}) was changed"
    return None
