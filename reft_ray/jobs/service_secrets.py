"""Secrets of the service itself, shared by its gateways: made once, kept in the database."""

from __future__ import annotations

import secrets

from sqlalchemy import insert, select

from reft_ray.jobs.database import Database
from reft_ray.jobs.tables import service_secrets


def service_secret(database: Database, name: str) -> str:
    """The secret of this name, e.g. `sessions`; made on its first use."""
    query = select(service_secrets.c.value).where(service_secrets.c.name == name)
    with database.write() as connection:
        database.serialize(connection, "secrets")
        found: str | None = connection.execute(query).scalar()
        if found is None:
            found = secrets.token_urlsafe(48)
            connection.execute(insert(service_secrets).values(name=name, value=found))
    return found
