"""The SQL database of all records: SQLite by default, PostgreSQL for several gateways."""

from __future__ import annotations

import secrets
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from filelock import FileLock
from sqlalchemy import Connection, Engine, Table, create_engine, event, insert, inspect, make_url, select, text
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, NoSuchModuleError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from reft_ray.core.errors import UsageError
from reft_ray.jobs.tables import service_secrets

UNREACHABLE = (OperationalError, InterfaceError, PoolTimeoutError)
"""What a database raises that is down, full or locked."""

LOCK_WAIT_SECONDS = 30
"""How long a writer waits for another one before it fails."""

POOL = 24
"""Connections in the pool, and as many overflow connections: a gateway serves up to 40 requests at once."""

_NOTICE_LOST_CLIENT = """SELECT set_config('tcp_keepalives_idle', '10', false),
    set_config('tcp_keepalives_interval', '5', false), set_config('tcp_keepalives_count', '3', false),
    set_config('tcp_user_timeout', '25000', false)"""
"""PostgreSQL holds the locks of a client whose host is lost until it notices: by default after two hours."""

# Otherwise a logged error would show the parameters, such as a webhook's secret.
_pooled = partial(create_engine, pool_size=POOL, max_overflow=POOL, hide_parameters=True)


class Database:
    """Connections and transactions; `now` is the clock (seconds since the epoch) of all records."""

    def __init__(self, engine: Engine, now: Callable[[], float] = time.time) -> None:
        self.engine = engine
        self.now = now
        self._writing = threading.Lock()

    @classmethod
    def open(cls, url: str, now: Callable[[], float] = time.time, migrate: bool = True) -> Database:
        """Open `sqlite:///path.db` or `postgresql+psycopg://...` and migrate its tables."""
        database = cls(_engine(url), now)
        try:
            if migrate:
                database.migrate()
        except BaseException:
            database.close()
            raise
        return database

    @classmethod
    def open_existing(cls, url: str) -> Database:
        """`open` an existing database. Raises UsageError where it has no records, and creates none."""
        database = cls(_engine(url, create=False))
        try:
            if not inspect(database.engine).has_table("audit_log"):
                raise UsageError(f"database {database.name}: it has no records of a service; start the service first")
            database.migrate()
        except DBAPIError as error:
            database.close()
            reason, *_ = str(error.orig).split("\n")  # the rest lists every address that was tried
            raise UsageError(f"database {database.name}: {reason}") from None
        except UsageError:
            database.close()
            raise
        return database

    @property
    def name(self) -> str:
        """The URL without its password, for messages."""
        return self.engine.url.render_as_string()

    @property
    def is_sqlite(self) -> bool:
        """Whether this is SQLite, which has one lock for the whole file."""
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A read-only transaction."""
        with self.engine.begin() as connection:
            yield connection

    @contextmanager
    def snapshot(self) -> Iterator[Connection]:
        """A read-only transaction over one snapshot."""
        # SQLite's transactions are snapshots; PostgreSQL by default takes one per statement.
        options: dict[str, Any] = {} if self.is_sqlite else {"isolation_level": "REPEATABLE READ"}
        with self.engine.connect().execution_options(**options) as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self, lock_seconds: float = LOCK_WAIT_SECONDS) -> Iterator[Connection]:
        """A transaction that commits or rolls back; on SQLite it waits `lock_seconds` for another writer."""
        options = {"reft_write": True, "reft_lock_wait": lock_seconds}
        with ExitStack() as stack:
            # SQLite's own wait is polling, in which one of many threads may never have its turn.
            if self.is_sqlite and self._writing.acquire(timeout=lock_seconds):
                stack.callback(self._writing.release)
            connection = stack.enter_context(self.engine.connect().execution_options(**options))
            stack.enter_context(connection.begin())
            yield connection

    def serialize(self, connection: Connection, name: str) -> None:
        """Hold a lock called `name` until the transaction ends. SQLite's writers are already serialized."""
        if not self.is_sqlite:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": zlib.crc32(name.encode())})

    def analyze(self, table: Table) -> None:
        """Count a table's rows for PostgreSQL's planner, as after every bulk load; SQLite's needs no counts."""
        if not self.is_sqlite:
            with self.write() as connection:
                connection.execute(text(f"ANALYZE {table.name}"))

    def migrate(self, revision: str = "head") -> None:
        """Migrate the tables to a revision, also an older one; safe when several gateways start at once.

        Tables of a newer version stay as they are. Raises UsageError where that version has said that this one cannot
        use them: its revision begins with another digit.
        """
        with self.write() as connection:
            self.serialize(connection, "migrations")
            found = MigrationContext.configure(connection).get_current_revision()
            newest = _newest_revision()
            if found == newest and revision == "head":
                return
            if found is not None and found > newest:
                if found[0] != newest[0]:
                    raise UsageError(
                        f"database {self.name}: its records are of revision {found}, and this version can use those "
                        f"up to {newest[0]}999: run the newer version, or restore the dump from before it"
                    )
                return
            config = _migrations()
            config.attributes["connection"] = connection
            (command.upgrade if revision == "head" else command.downgrade)(config, revision)

    def check(self) -> None:
        """Raise what the database raises where it does not answer."""
        with self.read() as connection:
            connection.execute(text("SELECT 1"))

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def _migrations() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


@cache
def _newest_revision() -> str:
    """Once per process: it imports every migration."""
    return ScriptDirectory.from_config(_migrations()).get_current_head() or ""


def _engine(url: str, create: bool = True) -> Engine:
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite":
            return _sqlite(url, create)
        engine = _pooled(parsed, pool_pre_ping=True)
    except (ArgumentError, NoSuchModuleError) as error:
        raise UsageError(
            f"database {url.split('@')[-1]!r}: {error}; use sqlite:///PATH or postgresql+psycopg://USER@HOST/NAME"
        ) from None
    except ImportError as error:
        raise UsageError(f"database {url.split('@')[-1]!r}: {error}; install psycopg (extra 'postgres')") from None

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _record: Any) -> None:
        # Not as an option of the connection, which PgBouncer refuses.
        cursor = connection.cursor()
        cursor.execute(_NOTICE_LOST_CLIENT)
        cursor.close()
        connection.commit()

    return engine


def _sqlite(url: str, create: bool) -> Engine:
    path = make_url(url).database
    if not path or path == ":memory:":
        raise UsageError("database: job records must survive the process; use sqlite:///PATH instead of memory")
    if create:
        Path(path).parent.mkdir(0o700, parents=True, exist_ok=True)
        # It holds the secrets of webhooks. SQLite gives its other files the mode of this one.
        Path(path).touch(0o600)
        # Two connections that switch a new file to WAL at once both fail immediately, whatever the timeout.
        with FileLock(f"{path}.lock", timeout=LOCK_WAIT_SECONDS), closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
    elif not Path(path).is_file():
        raise UsageError(f"database {url}: no such file")
    engine = _pooled(url, connect_args={"timeout": LOCK_WAIT_SECONDS, "check_same_thread": False})

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _record: Any) -> None:
        # The driver's own BEGIN is deferred, with which two read-then-write transactions deadlock.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        options = connection.get_execution_options()
        writes, seconds = options.get("reft_write", False), options.get("reft_lock_wait", LOCK_WAIT_SECONDS)
        # In WAL mode readers do not wait, and most writers wait as long as the one before: no statement for those.
        if writes and connection.info.get("reft_lock_wait") != seconds:
            connection.exec_driver_sql(f"PRAGMA busy_timeout = {int(seconds * 1000)}")
            connection.info["reft_lock_wait"] = seconds
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def service_secret(database: Database, name: str) -> str:
    """A secret of the service itself, e.g. `sessions`, which its gateways share; made on its first use."""
    query = select(service_secrets.c.value).where(service_secrets.c.name == name)
    with database.write() as connection:
        database.serialize(connection, "secrets")
        found: str | None = connection.execute(query).scalar()
        if found is None:
            found = secrets.token_urlsafe(48)
            connection.execute(insert(service_secrets).values(name=name, value=found))
    return found
