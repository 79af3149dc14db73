"""Opening, migrating and sharing a database."""

import threading

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, text
from sqlalchemy.exc import IntegrityError

from reft_ray.core.errors import UsageError
from reft_ray.jobs.audit import AuditLog
from reft_ray.jobs.database import Database
from reft_ray.jobs.tables import metadata
from reft_ray.jobs.training_tables import training_sessions


def test_the_migrations_arrive_at_the_tables(database):
    assert training_sessions.metadata is metadata
    with database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_migrating_again_changes_nothing(database):
    before = inspect(database.engine).get_table_names()
    database.migrate()
    assert inspect(database.engine).get_table_names() == before
    assert "alembic_version" in before


def test_an_older_version_runs_on_newer_records_unless_they_say_otherwise(database):
    url = database.engine.url.render_as_string(hide_password=False)

    def written_by(revision):
        with database.write() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = :it"), {"it": revision})

    written_by("0999")
    Database.open(url).close()
    Database.open_existing(url).close()
    written_by("1000")
    for start in (Database.open, Database.open_existing):
        with pytest.raises(UsageError, match="revision 1000, and this version can use those up to 0999"):
            start(url)


def test_records_outlive_a_rollback_and_an_upgrade(database):
    """Every revision down and up again, with a row in each table of the first one that holds records of people."""
    with database.write() as connection:
        connection.execute(text("INSERT INTO organizations VALUES ('org-1', 'a', 0)"))
        connection.execute(text("INSERT INTO projects VALUES ('proj_1', 'org-1', 'p', 0, '{}')"))
    AuditLog(database).append("project.created", {"type": "session"}, "proj_1", {"id": "proj_1"})
    for revision in ("0004", "0003", "0002", "0001", "head"):
        database.migrate(revision)
    with database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        assert connection.execute(text("SELECT id, organization_id FROM projects")).all() == [("proj_1", "org-1")]
    assert AuditLog(database).verify().fault is None


def test_gateways_that_start_together_migrate_once(tmp_path):
    """Making the folder, and switching a new file to WAL, are races."""
    errors, together = [], threading.Barrier(4)

    def start(url: str) -> None:
        together.wait()
        try:
            Database.open(url).close()
        except Exception as error:
            errors.append(error)

    for attempt in range(5):
        url = f"sqlite:///{tmp_path / str(attempt) / 'jobs.db'}"
        threads = [threading.Thread(target=start, args=(url,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []


def test_sqlite_writes_ahead_and_a_failed_transaction_leaves_nothing(sqlite_database):
    with sqlite_database.read() as connection:
        assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"

    def insert_twice() -> None:
        with sqlite_database.write() as connection:
            for _ in range(2):
                connection.execute(text("INSERT INTO organizations VALUES ('org-1', 'a', 0)"))

    with pytest.raises(IntegrityError):
        insert_twice()
    with sqlite_database.read() as connection:
        assert connection.execute(text("SELECT count(*) FROM organizations")).scalar() == 0


def test_writers_of_sqlite_wait_in_turn_and_without_a_connection(sqlite_database):
    """Polling left one of many without its turn until it failed, and each held a connection meanwhile."""
    made, asked = [], threading.Barrier(5)

    def write(number: int) -> None:
        asked.wait()
        with sqlite_database.write() as connection:
            connection.execute(text("INSERT INTO organizations VALUES (:id, :id, 0)"), {"id": f"org-{number}"})
            made.append(sqlite_database.engine.pool.checkedout())

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    with sqlite_database.write():
        for thread in threads:
            thread.start()
        asked.wait()
        assert sqlite_database.engine.pool.checkedout() == 1
    for thread in threads:
        thread.join()
    assert made == [1, 1, 1, 1]


def test_existing_records_are_opened_and_others_are_not_made(database):
    url = database.engine.url.render_as_string(hide_password=False)
    Database.open_existing(url).close()
    with pytest.raises(UsageError, match="typo"):
        Database.open_existing(f"{url}typo")


def test_a_password_is_in_no_message(postgres_url):
    url = postgres_url.replace("reft@", "reft:secret@")
    with pytest.raises(UsageError, match=r"reft:\*\*\*@.*/postgres: it has no records"):
        Database.open_existing(f"{url}/postgres")
    with pytest.raises(UsageError, match=r"reft:\*\*\*@.*/typo: .*does not exist"):
        Database.open_existing(f"{url}/typo")


def test_parameters_are_in_no_error(database):
    insert = text("INSERT INTO organizations VALUES (:id, 'a', 0)")
    with pytest.raises(IntegrityError) as refused, database.write() as connection:
        connection.execute(insert, [{"id": "whsec_secret"}, {"id": "whsec_secret"}])
    assert "INSERT INTO organizations" in str(refused.value)
    assert "[parameters:" not in str(refused.value)


@pytest.mark.parametrize("url", ["sqlite://", "nonsense", "mystery://host/db"])
def test_a_url_that_cannot_hold_records_is_refused(url):
    with pytest.raises(UsageError, match="use sqlite:///PATH"):
        Database.open(url)
