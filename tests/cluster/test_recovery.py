"""Disaster recovery, rehearsed with a real PostgreSQL and an object store: what docs/states.md says comes back."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fixtures.postgres import postgres_binaries
from fixtures.sqlite import sqlite_url
from sqlalchemy.exc import DBAPIError

from reft_ray.core.errors import ReftError
from reft_ray.jobs.audit import AuditLog
from reft_ray.jobs.content import ContentStore
from reft_ray.jobs.database import Database
from reft_ray.jobs.errors import NotFoundError
from reft_ray.jobs.files import FileStore
from reft_ray.jobs.tenants import Tenants

ROWS = b'{"messages": []}\n'


def psql(server: str, statement: str) -> None:
    import psycopg

    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(statement)


@pytest.fixture
def server(postgres_url: str) -> Iterator[str]:
    """A PostgreSQL with an empty database `recovery`."""
    server = postgres_url.replace("+psycopg", "")
    psql(server, "CREATE DATABASE recovery")
    yield server
    psql(server, "DROP DATABASE IF EXISTS recovery WITH (FORCE)")


def files_of(database: Database, root: Path) -> FileStore:
    return FileStore(database, ContentStore(str(root / "bucket")), 1 << 20, 1 << 24)


def test_a_killed_database_comes_back_from_its_dump(server: str, tmp_path: Path) -> None:
    url = f"{server}/recovery"
    database = Database.open(url.replace("postgresql", "postgresql+psycopg"))
    _, secret = Tenants(database).create_key("org", "first", "laptop")
    project = Tenants(database).authenticate(secret).project_id
    record = files_of(database, tmp_path).create(project, "train.jsonl", "fine-tune", [ROWS])
    head = AuditLog(database).verify().head

    programs, dump = postgres_binaries(), tmp_path / "reft.dump"
    subprocess.run([programs / "pg_dump", "--format=custom", f"--file={dump}", f"--dbname={url}"], check=True)
    # Connections are cut in the middle, as by a killed server, and everything in it is gone.
    psql(server, "DROP DATABASE recovery WITH (FORCE)")
    with pytest.raises((DBAPIError, ReftError)):
        Tenants(database).authenticate(secret)
    psql(server, "CREATE DATABASE recovery")
    subprocess.run([programs / "pg_restore", "--exit-on-error", f"--dbname={url}", dump], check=True)

    # The same pool: a gateway that was not restarted.
    assert Tenants(database).authenticate(secret).project_id == project
    assert b"".join(files_of(database, tmp_path).read(record.id, project)) == ROWS
    verified = AuditLog(database).verify(head)
    assert (verified.fault, verified.head) == (None, head)
    Tenants(database).create_key("org", "second", "after")
    assert AuditLog(database).verify(head).fault is None
    database.close()


def test_an_emptied_prefix_loses_its_files_and_nothing_else(tmp_path: Path) -> None:
    database = Database.open(sqlite_url(tmp_path))
    files = files_of(database, tmp_path)
    lost, kept = (files.create(project, "train.jsonl", "fine-tune", [ROWS]) for project in ("a", "b"))
    shutil.rmtree(tmp_path / "bucket" / "a")
    with pytest.raises(NotFoundError, match="File content"):
        files.read(lost.id, "a")
    assert files.get(lost.id, "a").sha256 == lost.sha256
    assert b"".join(files.read(kept.id, "b")) == ROWS
    again = files.create("a", "train.jsonl", "fine-tune", [ROWS])
    assert again.sha256 == lost.sha256
    assert b"".join(files.read(again.id, "a")) == ROWS
    database.close()
