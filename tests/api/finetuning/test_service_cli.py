"""The commands for keys, the audit log, files and jobs."""

import json
from pathlib import Path

import pytest
from fixtures.driving import driving
from fixtures.sqlite import sqlite_url
from sqlalchemy import update
from typer.testing import CliRunner

from reft_ray.cli import audit, files, jobs, keys
from reft_ray.cli.common import state_database
from reft_ray.jobs.audit import AuditLog
from reft_ray.jobs.database import Database
from reft_ray.jobs.fake_steps import FakeSteps
from reft_ray.jobs.tables import api_keys, audit_log
from reft_ray.jobs.tenants import Tenants


def run(app, *arguments, code=0):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def database(tmp_path):
    return sqlite_url(tmp_path)


@pytest.fixture
def records(database):
    records = Database.open(database)
    yield records
    records.close()


def test_a_key_is_made_listed_and_revoked(database, records):
    made = json.loads(
        run(
            keys.app, "create", "--org", "acme", "--scope", "chat", "--expires", "90d", "--database", database, "--json"
        )
    )
    tenants = Tenants(records)
    principal = tenants.authenticate(made["secret"])
    assert (principal.key_id, principal.scopes) == (made["id"], frozenset({"chat"}))
    assert made["expires_at"] == pytest.approx(tenants.database.now() + 90 * 86400, abs=60)
    listed = run(keys.app, "list", "--database", database)
    assert "acme/default" in listed
    assert "valid until" in listed
    assert made["secret"] not in listed
    run(keys.app, "revoke", made["id"], "--database", database)
    assert "revoked" in run(keys.app, "list", "--database", database)
    assert tenants.authenticate(made["secret"]) is None


def test_a_project_gets_limits_with_its_key(database, records):
    made = run(keys.app, "create", "--limit", "requests_per_minute=5", "--database", database, "--json")
    secret = json.loads(made)["secret"]
    assert Tenants(records).authenticate(secret).limits.requests_per_minute == 5


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["create", "--expires", "soon"], 2),
        (["create", "--expires", "99999999w"], 1),
        (["create", "--scope", "everything"], 1),
        (["create", "--limit", "x"], 2),
        (["revoke", "key_none"], 1),
    ],
)
def test_mistakes_are_one_line(database, records, arguments, code):
    output = run(keys.app, *arguments, "--database", database, code=code)
    assert output.startswith("error: ")
    assert output.count("\n") == 1
    assert Tenants(records).list_keys() == []


def test_a_key_that_outlives_the_calendar_is_listed(database, records):
    run(keys.app, "create", "--database", database)
    with records.write() as connection:
        connection.execute(update(api_keys).values(expires_at=1e14))
    assert "valid until 9999-12-31" in run(keys.app, "list", "--database", database)


def test_the_audit_log_is_verified(database, records):
    run(keys.app, "create", "--database", database)
    run(keys.app, "create", "--database", database)
    head = json.loads(run(audit.app, "verify", "--database", database, "--json"))["head"]
    assert "2 entries, none changed" in run(audit.app, "verify", "--head", head, "--database", database)
    assert "api_key.created  operator" in run(audit.app, "list", "--database", database)
    log = AuditLog(records)
    with log.database.write() as connection:
        connection.execute(update(audit_log).where(audit_log.c.seq == 2).values(type="nothing.happened"))
    assert "entry 2" in run(audit.app, "verify", "--database", database, code=1)


@pytest.mark.parametrize(
    ("app", "arguments"),
    [
        (keys.app, ["create"]),
        (keys.app, ["list"]),
        (keys.app, ["revoke", "key_1"]),
        (audit.app, ["verify"]),
        (audit.app, ["list"]),
    ],
)
def test_a_missing_database_is_refused_and_not_created(tmp_path, app, arguments):
    output = run(app, *arguments, "--database", f"sqlite:///{tmp_path / 'to' / 'typo.db'}", code=2)
    assert output.startswith("error: ")
    assert output.count("\n") == 1
    assert "typo.db" in output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"no database " * 99])
def test_a_file_without_records_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "other.db"
    path.write_bytes(content)
    output = run(audit.app, "verify", "--database", f"sqlite:///{path}", code=2)
    assert output.startswith("error: ")
    assert output.count("\n") == 1
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (content, [path])


def test_without_a_name_it_is_the_database_of_the_service_in_this_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REFT_DATABASE", raising=False)
    Database.open(state_database(Path("state"))).close()
    assert "in sqlite:///state/service.db; the secret" in run(keys.app, "create")
    assert "1 keys in sqlite:///state/service.db" in run(keys.app, "list")
    assert "1 entries, none changed, in sqlite:///state/service.db." in run(audit.app, "verify")
    monkeypatch.setenv("REFT_DATABASE", "sqlite:///other.db")
    assert "other.db" in run(audit.app, "verify", code=2)


def test_a_file_becomes_a_model_from_the_command_line(service, rows, tmp_path):
    stores, access = service.stores, ["--url", f"{service.url}/v1", "--key", service.secret("cli")]
    train = tmp_path / "train.jsonl"
    train.write_bytes(rows)
    file = run(files.app, "upload", str(train), *access).strip()
    assert f"{file}  " in run(files.app, "list", *access)
    run(files.app, "get", file, "--out", str(tmp_path / "again.jsonl"), *access)
    assert (tmp_path / "again.jsonl").read_bytes() == rows
    assert "exists; name a new file" in run(files.app, "get", file, "--out", str(train), *access, code=2)
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(rows + b'{"messages": [{"role": "user", "content": "a bomb"}]}\n')
    unsafe = run(files.app, "upload", str(bad), *access).strip()

    job = run(jobs.app, "create", "--model", "tiny", "--file", file, "--yes", "--suffix", "cli", *access).strip()
    blocked = run(jobs.app, "create", "--model", "tiny", "--file", unsafe, "--policy", "fail", "--yes", *access).strip()
    with driving(stores, FakeSteps()):
        output = run(jobs.app, "watch", job, "--seconds", "0.2", *access)
        assert output.splitlines()[-1] == "info  The job has successfully completed"
        assert len(output.splitlines()) == len(set(output.splitlines())) == 18
        assert "1 of 11" in run(jobs.app, "watch", blocked, "--seconds", "0.2", *access, code=3)
    assert json.loads(run(jobs.app, "show", job, *access))["status"] == "succeeded"
    assert "ft:tiny:" in run(jobs.app, "list", *access)
    assert "cannot become cancelled" in run(jobs.app, "cancel", job, *access, code=1)
    assert file in run(files.app, "delete", file, *access)


def test_a_persons_rows_are_erased(service, rows, tmp_path):
    access = ["--url", f"{service.url}/v1", "--key", service.secret("erased")]
    train = tmp_path / "train.jsonl"
    train.write_bytes(rows + rows.replace(b"hi", b"I am ann@example.org"))
    file = run(files.app, "upload", str(train), *access).strip()
    assert "10 rows found in 1 files" in run(files.app, "erase", "ann@example.org", "--dry-run", *access)
    assert file in run(files.app, "erase", "ann@example.org", *access)
    assert json.loads(run(files.app, "erase", "ann@example.org", "--json", *access))["rows"] == 0
    run(files.app, "get", file, "--out", str(tmp_path / "left"), *access)
    assert (tmp_path / "left").read_bytes().strip() == rows.strip()


def test_the_estimate_is_printed(service, rows, tmp_path):
    access = ["--url", f"{service.url}/v1", "--key", service.secret("cost")]
    train = tmp_path / "train.jsonl"
    train.write_bytes(rows)
    file = run(files.app, "upload", str(train), *access).strip()
    result = CliRunner().invoke(jobs.app, ["create", "--model", "tiny", "--file", file, *access], input="n\n")
    assert "10 rows, about" in result.output
    assert "device hours" in result.output
    assert result.output.splitlines()[0].endswith(" EUR")
    assert run(jobs.app, "list", *access) == ""


def test_an_unreachable_service_is_one_line(tmp_path):
    output = run(jobs.app, "list", "--url", "http://127.0.0.1:9/v1", code=1)
    assert "is the service running?" in output
    assert "is the service running?" in run(jobs.app, "list", "--url", "http://[::1/v1", code=1)
    out = tmp_path / "file"
    output = run(files.app, "get", "file-x", "--out", str(out), "--url", "http://127.0.0.1:9/v1", code=1)
    assert "is the service running?" in output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["schlüssel", "two\nlines"])
def test_a_key_that_cannot_be_sent_is_one_line_that_does_not_repeat_it(key):
    output = run(jobs.app, "list", "--url", "http://127.0.0.1:9/v1", "--key", key, code=2)
    assert output == "error: --key: a key contains only printable ASCII characters; copy it again\n"
