"""Opening, migrating and sharing a database."""

import json
import threading

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, select, text
from sqlalchemy.exc import IntegrityError

from reft_ray.core.errors import UsageError
from reft_ray.jobs.database import Database
from reft_ray.jobs.job import JobSpec, Options
from reft_ray.jobs.job_store import JobStore
from reft_ray.jobs.tables import jobs, metadata


def test_the_migrations_arrive_at_the_tables(database):
    with database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_migrating_again_changes_nothing(database):
    before = inspect(database.engine).get_table_names()
    database.migrate()
    assert inspect(database.engine).get_table_names() == before
    assert "alembic_version" in before


def test_jobs_of_the_first_version_keep_their_files_and_their_model(tmp_path, clock):
    """Also those whose spec SQLite cannot parse: Python writes an infinity as no JSON."""
    database = Database.open(f"sqlite:///{tmp_path / 'jobs.db'}", clock, migrate=False)
    database.migrate("0001")
    spec = JobSpec("tiny", "file-1", 7, validation_file="file-2", options=Options(kd_weight=float("inf")))
    added = {"model", "training_file", "validation_file"}
    values = {
        **{column.name: None for column in jobs.c if column.name not in {"seq", *added}},
        **{"id": "ftjob-1", "organization_id": "org-1", "project_id": "proj_1", "status": "running"},
        **{"spec": json.dumps(spec.to_json()), "metadata": "{}", "result_files": "[]"},
        **{"created_at": 0.0, "attempt": 1, "failures": 0},
    }
    with database.write() as connection:
        names = ", ".join(values)
        connection.execute(text(f"INSERT INTO jobs ({names}) VALUES (:{names.replace(', ', ', :')})"), values)
    database.migrate()
    with database.read() as connection:
        found = connection.execute(select(jobs.c.model, jobs.c.training_file, jobs.c.validation_file)).one()
    assert tuple(found) == ("tiny", "file-1", "file-2")
    assert JobStore(database).get("ftjob-1").spec == spec
    database.close()


def test_gateways_that_start_together_migrate_once(tmp_path):
    """Twenty new files: turning one to WAL from two sides failed about once in a hundred starts."""
    errors = []

    def start(url: str) -> None:
        try:
            Database.open(url).close()
        except Exception as error:
            errors.append(error)

    for attempt in range(20):
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


def test_what_was_to_be_stored_is_in_no_error(database):
    insert = text("INSERT INTO organizations VALUES (:id, 'a', 0)")
    with pytest.raises(IntegrityError) as refused, database.write() as connection:
        connection.execute(insert, [{"id": "whsec_secret"}, {"id": "whsec_secret"}])
    assert "INSERT INTO organizations" in str(refused.value)
    assert "[parameters:" not in str(refused.value)


@pytest.mark.parametrize("url", ["sqlite://", "nonsense", "mystery://host/db"])
def test_a_url_that_cannot_hold_records_is_refused(url):
    with pytest.raises(UsageError, match="use sqlite:///PATH"):
        Database.open(url)
