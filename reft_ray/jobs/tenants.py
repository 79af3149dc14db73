"""Organisations, projects and API keys. A key is stored as a hash and shown once, at its creation."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import bindparam, insert, select, update

from reft_ray.jobs import ids
from reft_ray.jobs.audit import AuditLog
from reft_ray.jobs.database import Database
from reft_ray.jobs.errors import InvalidError, NotFoundError
from reft_ray.jobs.review import Reviewer
from reft_ray.jobs.tables import api_keys, organizations, projects

PREFIX = "sk-reft-"
SCOPES = (
    "files.read",
    "files.write",
    "fine_tuning.read",
    "fine_tuning.write",
    "models.read",
    "models.write",
    "chat",
    "moderations",
    "webhooks",
    "reviews.read",
    "reviews.write",
    "appeals.read",
    "appeals.write",
    "releases.read",
    "releases.write",
    "audit.read",
    "admin",
)
_STAFF = ("reviews.read", "reviews.write", "appeals.read", "appeals.write", "releases.read")
ROLES: Mapping[str, tuple[str, ...]] = {
    "owner": (*SCOPES[: SCOPES.index("reviews.write")], "appeals.read", "appeals.write"),
    "curator": _STAFF,
    "lead": (*_STAFF, "releases.write", "audit.read"),
    "operator": SCOPES,
    "auditor": ("reviews.read", "appeals.read", "releases.read", "audit.read"),
}
"""The most scopes of a key by its role. An owner sees their own project; the others see all of them."""
OWNER = "owner"
MAX_SECONDS = 100 * 365 * 86400
OPERATOR: Mapping[str, Any] = {"type": "session", "session": {"user": "operator"}}
"""The audit log's actor for the command line."""


@dataclass(frozen=True, slots=True)
class Limits:
    """A project's limits over all gateways."""

    requests_per_minute: int = 600
    tokens_per_minute: int = 1_000_000
    moderation_tokens_per_minute: int = 10_000_000
    unfinished_jobs: int = 50

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Limits:
        """The defaults, overridden by the project's values."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in document.items() if name in known})


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller: the project that owns the objects it creates, its role, and the scopes of its key."""

    organization_id: str
    project_id: str
    key_id: str | None
    scopes: frozenset[str]
    limits: Limits
    role: str = OWNER
    name: str = "operator"
    """Shown to other people: unique, the key's name and id, or the name of who signed in."""

    @property
    def actor(self) -> dict[str, Any]:
        """This principal in the audit log."""
        if self.key_id is None:
            return {"type": "session", "session": {"user": self.name}}
        return {"type": "api_key", "api_key": {"id": self.key_id, "type": "user"}}

    @property
    def reviewer(self) -> Reviewer:
        """This principal as one who decides."""
        return Reviewer(self.name, self.actor)

    @property
    def visible(self) -> str | None:
        """The one project whose rows, appeals and jobs this principal may see; None for all projects."""
        return self.project_id if self.role == OWNER else None


LOCAL = Principal("org-local", "proj_local", None, frozenset(SCOPES), Limits(), "operator")
"""The caller of a service without keys, which answers on loopback only."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key without its secret."""

    id: str
    project_id: str
    name: str
    hint: str
    scopes: Sequence[str]
    role: str
    created_at: float
    expires_at: float | None
    revoked_at: float | None


_PRINCIPAL = {
    name: select(api_keys, projects.c.organization_id, projects.c.limits)
    .join_from(api_keys, projects)
    .where(api_keys.c[name] == bindparam("it"))
    for name in ("digest", "id")
}
"""The query of a principal by a column of its key: made once, as every request asks it."""

_COLUMNS = [api_keys.c[field.name] for field in fields(ApiKey)]


class Tenants:
    """Create, look up and revoke keys."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.audit = AuditLog(database)

    def create_key(
        self,
        organization: str,
        project: str,
        name: str,
        scopes: Sequence[str] | None = None,
        expires_seconds: float | None = None,
        limits: Mapping[str, int] | None = None,
        role: str = OWNER,
        actor: Mapping[str, Any] = OPERATOR,
    ) -> tuple[ApiKey, str]:
        """Create a key and return it with its secret; creates the organisation and the project if necessary.

        `scopes` are at most those of the role, and all of them by default. `limits` update those of the project.
        Raises InvalidError.
        """
        if role not in ROLES:
            raise InvalidError(f"role {role!r} is unknown; choose from {', '.join(ROLES)}", "role")
        scopes = ROLES[role] if scopes is None else scopes
        unknown = sorted(set(scopes) - set(ROLES[role]))
        if unknown or not scopes:
            given, known = ", ".join(unknown) or "none given", ", ".join(ROLES[role])
            raise InvalidError(f"scopes: {given}; a key of role {role} may have {known}", "scopes")
        if expires_seconds is not None and expires_seconds <= 0:
            raise InvalidError("a key must expire in the future", "expires")
        if expires_seconds is not None and expires_seconds > MAX_SECONDS:
            raise InvalidError("a key must expire within 100 years, or not at all", "expires")
        _check(limits or {})
        now, secret, key_id = self.database.now(), PREFIX + secrets.token_urlsafe(32), ids.new_id(ids.KEY)
        with self.database.write() as connection:
            self.database.serialize(connection, "tenants")
            organization_id = connection.execute(
                select(organizations.c.id).where(organizations.c.name == organization)
            ).scalar()
            if organization_id is None:
                organization_id = ids.new_id(ids.ORGANIZATION)
                connection.execute(insert(organizations).values(id=organization_id, name=organization, created_at=now))
            project_id = connection.execute(
                select(projects.c.id).where(projects.c.organization_id == organization_id, projects.c.name == project)
            ).scalar()
            if project_id is None:
                project_id = ids.new_id(ids.PROJECT)
                connection.execute(
                    insert(projects).values(
                        id=project_id, organization_id=organization_id, name=project, created_at=now, limits={}
                    )
                )
            connection.execute(
                insert(api_keys).values(
                    id=key_id,
                    project_id=project_id,
                    name=name,
                    digest=_digest(secret),
                    hint=f"{PREFIX}...{secret[-4:]}",
                    scopes=list(scopes),
                    role=role,
                    created_at=now,
                    expires_at=None if expires_seconds is None else now + expires_seconds,
                )
            )
            data = {"id": key_id, "role": role, "scopes": list(scopes)}
            self.audit.append_in(connection, "api_key.created", actor, project_id, data)
            if limits:
                mine = projects.c.id == project_id
                stored = connection.execute(select(projects.c.limits).where(mine)).scalar_one()
                connection.execute(update(projects).where(mine).values(limits={**stored, **limits}))
                self.audit.append_in(connection, "rate_limit.updated", actor, project_id, dict(limits))
        return self.key(key_id), secret

    def key(self, key_id: str) -> ApiKey:
        """Get a key. Raises NotFoundError."""
        with self.database.read() as connection:
            row = connection.execute(select(*_COLUMNS).where(api_keys.c.id == key_id)).first()
        if row is None:
            raise NotFoundError("API key", key_id)
        return ApiKey(*row)

    def list_keys(self) -> list[tuple[str, str, ApiKey]]:
        """All keys with the names of their organisation and project, sorted by these, age and name."""
        query = (
            select(organizations.c.name, projects.c.name, *_COLUMNS)
            .join_from(api_keys, projects)
            .join(organizations)
            .order_by(organizations.c.name, projects.c.name, api_keys.c.created_at, api_keys.c.name)
        )
        with self.database.read() as connection:
            return [(row[0], row[1], ApiKey(*row[2:])) for row in connection.execute(query)]

    def revoke(self, key_id: str, actor: Mapping[str, Any] = OPERATOR) -> ApiKey:
        """Revoke a key; revoking it again changes nothing."""
        key = self.key(key_id)
        with self.database.write() as connection:
            changed = connection.execute(
                update(api_keys)
                .where(api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None))
                .values(revoked_at=self.database.now())
            ).rowcount
            if changed:
                self.audit.append_in(connection, "api_key.deleted", actor, key.project_id, {"id": key_id})
        return self.key(key_id)

    def any_keys(self) -> bool:
        """Whether the service has any keys; without any, it answers on loopback only."""
        with self.database.read() as connection:
            return connection.execute(select(api_keys.c.id).limit(1)).first() is not None

    def authenticate(self, secret: str) -> Principal | None:
        """The principal of a secret; None when it is unknown, revoked or expired."""
        return self._principal("digest", _digest(secret))

    def principal(self, key_id: str) -> Principal | None:
        """The principal of a key that a session was opened with; None when it is revoked or expired."""
        return self._principal("id", key_id)

    def _principal(self, column: str, value: str) -> Principal | None:
        with self.database.read() as connection:
            row = connection.execute(_PRINCIPAL[column], {"it": value}).first()
        if row is None or row.revoked_at is not None:
            return None
        if row.expires_at is not None and row.expires_at <= self.database.now():
            return None
        return Principal(
            row.organization_id,
            row.project_id,
            row.id,
            frozenset(row.scopes),
            Limits.from_json(row.limits),
            row.role,
            f"{row.name} ({row.id})",
        )


def _check(limits: Mapping[str, int]) -> None:
    known = {field.name for field in fields(Limits)}
    for name, value in limits.items():
        if name not in known:
            raise InvalidError(f"limit {name!r} is unknown; choose from {', '.join(sorted(known))}", name)
        if value < 0:
            raise InvalidError(f"limit {name} must be 0 or more, not {value}", name)


def _digest(secret: str) -> str:
    # 256 random bits need no slow hash: they cannot be guessed.
    return hashlib.sha256(secret.encode()).hexdigest()
