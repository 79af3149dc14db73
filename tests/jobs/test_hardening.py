"""Clocks that step, writers that are killed, names with a meaning in JSON paths, logs that are deleted as a whole."""

import os
import signal
import stat
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from sqlalchemy import delete

from reft_ray.core.errors import UsageError
from reft_ray.jobs.audit import AuditLog
from reft_ray.jobs.audit_heads import PUBLISH_SECONDS, AuditHeads
from reft_ray.jobs.content import LINE_BYTES, ContentStore, split_lines
from reft_ray.jobs.database import Database
from reft_ray.jobs.errors import InvalidError, NotFoundError
from reft_ray.jobs.job import Status
from reft_ray.jobs.lease import Leases, Slots
from reft_ray.jobs.rate_limits import RateLimits
from reft_ray.jobs.reconciler import Reconciler
from reft_ray.jobs.tables import audit_head, audit_log
from reft_ray.jobs.tenants import OPERATOR


def test_a_bucket_filled_by_a_clock_that_was_ahead_refills(database, clock):
    limits = RateLimits(database)
    clock.advance(3600)
    assert limits.take("proj_a", "requests", 1, 60).allowed
    clock.advance(-3600)
    for _ in range(59):
        assert limits.take("proj_a", "requests", 1, 60).allowed
    refused = limits.take("proj_a", "requests", 1, 60)
    assert not refused.allowed
    clock.advance(refused.wait)
    assert limits.take("proj_a", "requests", 1, 60).allowed


def test_two_gateways_whose_clocks_differ_by_seconds_refill_a_bucket_once(database, clock):
    limits, passed = RateLimits(database), 0
    for turn in range(400):
        clock.advance(2 if turn % 2 else -2)
        passed += limits.take("proj_a", "requests", 1, 60).allowed
    assert passed <= 62


def test_a_lease_of_a_clock_that_was_ahead_ends_unless_it_is_renewed(jobs, spec, clock):
    leases = Leases(jobs)
    job = jobs.create("org-a", "proj_a", spec, {})
    attempt = leases.claim(job)
    clock.advance(3600)
    leases.acquire(job.id, attempt, "owner")
    clock.advance(-3600)
    assert leases.is_driven(jobs.get(job.id))
    clock.advance(leases.lease_seconds + 1)
    assert not leases.is_driven(jobs.get(job.id))
    clock.advance(3600)
    leases.renew(job.id, "owner")
    clock.advance(-3600)
    assert leases.is_driven(jobs.get(job.id))


class Started:
    """A launcher whose drivers never end."""

    def __init__(self):
        self.jobs = []

    def start(self, job_id, attempt):
        self.jobs.append(job_id)
        return f"test:{job_id}"

    def stop(self, handle):
        pass

    def is_alive(self, handle):
        return True

    def is_waiting(self, handle):
        return False


def test_validations_of_one_project_leave_a_slot_to_the_others(jobs, spec):
    for _ in range(3):
        jobs.create("org-a", "proj_a", spec, {})
    other = jobs.create("org-b", "proj_b", spec, {})
    launcher = Started()
    reconciler = Reconciler(jobs, Leases(jobs), launcher, Slots(validating=2))
    reconciler.tick()
    reconciler.tick()
    assert other.id in launcher.jobs
    assert len(launcher.jobs) == 2
    assert {job.status for job in jobs.list("proj_a").items} == {Status.VALIDATING}


ODD_KEYS = [
    'a"b',
    "\\",
    "a\\b",
    "é",
    "名",
    ".",
    "a.b",
    "\x01",
    "\x7f",
    "a'b",
    "[0]",
    "$",
    "$.a",
    " ",
    '"',
    "%",
    "{}",
    "1",
    "key",
]


def test_metadata_is_found_by_any_key(jobs, spec):
    made = {key: jobs.create("org-a", "proj_a", spec, {key: "x", "all": "y"}).id for key in ODD_KEYS}
    for key, job_id in made.items():
        assert [job.id for job in jobs.list("proj_a", metadata={key: "x"}).items] == [job_id], key
        assert jobs.list("proj_a", metadata={key: "z"}).items == ()
    assert len(jobs.list("proj_a", metadata={"all": "y"}, limit=100).items) == len(ODD_KEYS)
    for pair in ({"\0": "x"}, {"key": "\0"}):
        assert jobs.list("proj_a", metadata=pair).items == ()
    with pytest.raises(InvalidError, match="up to 16"):
        jobs.list("proj_a", metadata={f"k{number}": "x" for number in range(17)})


WRITER = """
import sys, time
from reft_ray.jobs.content import ContentStore

def chunks():
    yield b"how do I steal a car" * 1000
    print("written", flush=True)
    time.sleep(60)

ContentStore(sys.argv[1]).write("proj_a/files/file-1", chunks())
"""


def test_a_killed_writer_leaves_nothing_after_a_sweep(tmp_path):
    store = ContentStore(str(tmp_path / "content"))
    command = [sys.executable, "-c", WRITER, str(tmp_path / "content")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "written\n"
        writer.send_signal(signal.SIGKILL)
    left = [path for path in (tmp_path / "content").rglob("*") if path.is_file()]
    assert len(left) == 1
    assert store.sweep(time.time() - 3600) == 0  # it may still be written
    os.utime(left[0], (time.time() - 7200, time.time() - 7200))
    assert store.sweep(time.time() - 3600) == 1
    assert not [path for path in (tmp_path / "content").rglob("*") if path.is_file()]


def test_files_and_databases_are_private_to_their_user(tmp_path):
    before = os.umask(0o022)
    try:
        ContentStore(str(tmp_path / "content")).write("proj_a/files/file-1", [b"x"])
        database = Database.open(f"sqlite:///{tmp_path / 'state' / 'jobs.db'}")
        AuditHeads(str(tmp_path / "heads"), tmp_path / "audit.pem")
        with database.write():
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
        database.close()
    finally:
        os.umask(before)
    assert modes.keys() >= {"file-1", "jobs.db", "jobs.db-wal", "jobs.db-shm", "audit.pem"}
    assert modes.pop("jobs.db.lock") is not None  # it is empty
    assert {name for name, mode in modes.items() if mode & 0o077} == set()


def test_bytes_that_are_gone_are_not_found_before_the_first_of_them_is_sent(files, content):
    record = files.create("proj_a", "a.jsonl", "user_data", [b"x"])
    content.delete(f"proj_a/files/{record.id}")
    with pytest.raises(NotFoundError):
        files.read(record.id, "proj_a")


def test_a_file_of_one_line_is_cut_off_and_not_kept():
    piece = b"x" * (1 << 20)
    tracemalloc.start()
    lengths = [len(line) for line in split_lines(piece for _ in range(64))]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lengths == [LINE_BYTES]
    assert peak < 4 * LINE_BYTES
    assert list(split_lines([b"ab", b"c\nde", b"\n\nf"], longest=2)) == [b"ab", b"de", b"", b"f"]


@pytest.fixture
def heads(tmp_path):
    return AuditHeads(str(tmp_path / "heads"), tmp_path / "audit.pem")


def test_a_log_that_is_deleted_as_a_whole_is_missed(database, clock, heads, tmp_path):
    log = AuditLog(database)
    log.append("file.created", OPERATOR)
    assert heads.publish(heads.verify(log), clock())
    log.append("file.deleted", OPERATOR)
    assert not heads.publish(heads.verify(log), clock())  # the last one is not an hour old
    clock.advance(PUBLISH_SECONDS)
    assert heads.publish(heads.verify(log), clock())
    assert heads.verify(log).fault is None
    with database.write() as connection:
        connection.execute(delete(audit_log))
        connection.execute(delete(audit_head))
    assert log.verify().fault is None
    assert "not in the chain" in heads.verify(log).fault
    log.append("file.created", OPERATOR)  # a chain that starts again is another one
    assert "not in the chain" in heads.verify(log).fault


def test_a_head_is_believed_by_its_signature(database, clock, heads, tmp_path):
    log = AuditLog(database)
    log.append("file.created", OPERATOR)
    heads.publish(heads.verify(log), clock())
    (stored,) = Path(tmp_path / "heads").glob("head-*.json")
    stored.write_text(stored.read_text().replace('"entries": 1', '"entries": 0'))
    assert "not a head signed" in heads.verify(log).fault
    other = AuditHeads(str(tmp_path / "heads"), tmp_path / "other.pem")
    with pytest.raises(UsageError, match="not a head signed"):
        other.newest()
