"""The audit log: changed, removed and truncated entries are detected."""

import threading

import pytest
from sqlalchemy import delete, event, insert, select, update

from reft_ray.jobs.audit import AuditLog
from reft_ray.jobs.tables import audit_head, audit_log


@pytest.fixture
def log(database):
    log = AuditLog(database)
    for number in range(5):
        log.append("file.created", {"type": "api_key", "api_key": {"id": "key_1"}}, "proj_a", {"n": number, "x": 0.1})
    return log


def test_an_untouched_log_verifies(log):
    assert log.verify().fault is None
    assert log.verify().entries == 5
    assert [entry.data["n"] for entry in log.entries(after=2)] == [2, 3, 4]


def test_an_empty_log_verifies(database):
    assert AuditLog(database).verify().fault is None


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (update(audit_log).where(audit_log.c.seq == 3).values(data={"n": 9}), "entry 3 .* was changed"),
        (update(audit_log).where(audit_log.c.seq == 3).values(actor={}), "entry 3 .* was changed"),
        (update(audit_log).where(audit_log.c.seq == 3).values(effective_at=1.0), "entry 3 .* was changed"),
        (update(audit_log).where(audit_log.c.seq == 3).values(project_id="proj_b"), "entry 3 .* was changed"),
        (delete(audit_log).where(audit_log.c.seq == 3), "entry 3 is missing"),
        (delete(audit_log).where(audit_log.c.seq == 5), "entries after 4 are missing"),
        (delete(audit_log), "entries after 0 are missing"),
    ],
)
def test_every_change_is_found(log, change, fault):
    with log.database.write() as connection:
        connection.execute(change)
    with pytest.raises(AssertionError, match=fault):
        raise AssertionError(log.verify().fault)


def test_a_rehashed_entry_breaks_the_chain_after_it(log):
    from dataclasses import replace

    with log.database.write() as connection:
        forged = replace(log.entries()[2], data={"n": 9})
        connection.execute(update(audit_log).where(audit_log.c.seq == 3).values(data=forged.data, hash=forged.digest()))
    assert log.verify().fault == "entry 4 does not follow the one before it"


def test_a_completely_rewritten_log_fails_against_an_earlier_head(log):
    head = log.verify().head
    log.append("file.created", {}, "proj_a")
    assert log.verify(head).fault is None
    with log.database.write() as connection:
        connection.execute(delete(audit_log))
        connection.execute(delete(audit_head))
    log.append("file.created", {}, "proj_a")
    assert log.verify().fault is None
    assert "remembered head" in log.verify(head).fault


def test_gateways_that_write_together_make_one_chain(log):
    start = threading.Barrier(5)

    def write() -> None:
        start.wait()
        for _ in range(4):
            log.append("file.created", {}, "proj_a")

    threads = [threading.Thread(target=write) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (log.verify().entries, log.verify().fault) == (25, None)


@pytest.mark.parametrize("moment", ["FROM audit_log", "FROM audit_head"])
def test_an_entry_added_during_a_verification_is_not_a_fault(log, moment):
    added = []

    def add(_connection, _cursor, statement, *_rest):
        if moment in statement and not added:
            added.append(moment)
            log.append("file.created", {}, "proj_a")

    event.listen(log.database.engine, "before_cursor_execute", add)
    assert log.verify().fault is None
    assert added == [moment]
    assert log.verify().entries == 6


def test_a_rolled_back_change_leaves_no_entry(log):
    def fail() -> None:
        with log.database.write() as connection:
            log.append_in(connection, "file.deleted", {}, "proj_a")
            connection.execute(insert(audit_log).values(seq=1))

    with pytest.raises(Exception, match=r"."):
        fail()
    with log.database.read() as connection:
        assert connection.execute(select(audit_head.c.seq)).scalar() == 5
    assert log.verify().fault is None
