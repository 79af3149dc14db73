"""Background work: expired and deleted files are removed, webhooks arrive over real HTTP."""

import contextlib
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import openai
import pytest

from reft_ray.jobs.audit import AuditLog
from reft_ray.jobs.files import FileStore, job_key, scratch_key
from reft_ray.jobs.housekeeping import SWEEP_SECONDS, Housekeeping, post
from reft_ray.jobs.job import Event, Status
from reft_ray.jobs.job_store import JobStore
from reft_ray.jobs.models import ModelStore
from reft_ray.jobs.tables import audit_log
from reft_ray.jobs.uploads import UploadStore
from reft_ray.jobs.webhooks import Webhooks
from reft_ray.telemetry import catalog
from reft_ray.telemetry.recorder import MemoryRecorder


@pytest.fixture
def housekeeping(sqlite_database, content):
    return Housekeeping(
        JobStore(sqlite_database, MemoryRecorder()),
        UploadStore(FileStore(sqlite_database, content)),
        ModelStore(sqlite_database),
        Webhooks(sqlite_database, allow_private=True),
        AuditLog(sqlite_database),
    )


@pytest.fixture
def student(housekeeping, spec):
    job = housekeeping.store.create("org-a", "proj_a", spec, {})
    housekeeping.files.content.write(f"{job_key('proj_a', job.id)}/adapter", [b"weights"])
    with housekeeping.store.database.write() as connection:
        housekeeping.models.register_in(connection, job, "uri")
    return job


def test_a_deleted_students_files_are_removed(housekeeping, student):
    key = f"{job_key('proj_a', student.id)}/adapter"
    housekeeping.tick()
    assert housekeeping.files.content.exists(key)
    housekeeping.models.delete(student.model_name, "proj_a")
    housekeeping.sweep()
    assert not housekeeping.files.content.exists(key)
    assert housekeeping.models.deleted() == []


@pytest.mark.parametrize(("end", "kept"), [(Status.SUCCEEDED, True), (Status.FAILED, False), (Status.CANCELLED, False)])
def test_an_ended_job_keeps_no_rows_and_only_a_released_student(housekeeping, spec, end, kept):
    job = housekeeping.store.create("org-a", "proj_a", spec, {})
    rows, adapter = scratch_key("proj_a", job.id) + "/kept.jsonl", job_key("proj_a", job.id) + "/adapter"
    for key in (rows, adapter):
        housekeeping.files.content.write(key, [b"x"])
    for status in (Status.QUEUED, Status.RUNNING):
        housekeeping.store.move(job.id, status, Event("on"))
    housekeeping.sweep()
    assert housekeeping.files.content.exists(rows)
    housekeeping.store.move(job.id, end, Event("over"))
    housekeeping.sweep()
    assert not housekeeping.files.content.exists(rows)
    assert housekeeping.files.content.exists(adapter) is kept
    assert housekeeping.store.to_clean() == []


def test_job_counts_are_set_at_scrapes_only(housekeeping, student):
    """Set here as well, projects that share a metrics label would overwrite each other."""
    housekeeping.tick()
    assert housekeeping.store.recorder.series(catalog.JOBS) == []


def test_a_broken_audit_log_is_counted(housekeeping, clock):
    housekeeping.audit.append("file.created", {})
    housekeeping.tick()
    assert housekeeping.store.recorder.total(catalog.AUDIT_BREAKS) == 0
    with housekeeping.store.database.write() as connection:
        connection.execute(audit_log.update().values(type="nothing.happened"))
    clock.advance(SWEEP_SECONDS + 1)
    housekeeping.tick()
    assert housekeeping.store.recorder.total(catalog.AUDIT_BREAKS) == 1


def test_a_webhook_arrives(housekeeping, student, monkeypatch, clock):
    received = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append((body, dict(self.headers)))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            """Stay silent."""

    with HTTPServer(("127.0.0.1", 0), Hook) as server:
        endpoint = housekeeping.webhooks.add("proj_a", f"http://127.0.0.1:{server.server_port}/hook")
        housekeeping.store.move(student.id, Status.CANCELLED, Event("over"))
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        housekeeping.deliver()
        thread.join()
    monkeypatch.setattr("time.time", clock)
    event = openai.OpenAI(api_key="none", webhook_secret=endpoint.secret).webhooks.unwrap(*received[0])
    assert (event.type, event.data.id) == ("fine_tuning.job.cancelled", student.id)
    housekeeping.webhooks.remove(endpoint.id, "proj_a")


@contextlib.contextmanager
def answering(first: bytes, then: bytes):
    """An endpoint that sends `first`, then `then` repeatedly until the client disconnects."""

    def serve():
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            while not connection.recv(65536).endswith(b"{}"):
                pass
            connection.sendall(first)
            while not gone.wait(0.05):
                connection.sendall(then)

    gone = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/hook"
        finally:
            gone.set()
            thread.join()


def test_the_response_body_is_not_read():
    with answering(b"HTTP/1.1 202 Accepted\r\ncontent-length: 1000000000000\r\n\r\n", b"") as url:
        assert post(url, b"{}", {}) == 202


def test_an_endless_response_is_abandoned(monkeypatch):
    monkeypatch.setattr("reft_ray.jobs.housekeeping.POST_SECONDS", 0.5)
    with answering(b"HTTP/1.1 200 OK\r\n", b"x-more: to come\r\n") as url, pytest.raises(OSError, match="TimeoutError"):
        post(url, b"{}", {})


def test_a_hanging_endpoint_delays_nothing_else(housekeeping, student, monkeypatch):
    posting, counted, over = threading.Event(), threading.Event(), threading.Event()

    def hang(*_):
        posting.set()
        over.wait()
        return 200

    def count(_):
        if posting.is_set():
            counted.set()

    monkeypatch.setattr("reft_ray.jobs.housekeeping.post", hang)
    monkeypatch.setattr(Housekeeping, "tick", count)
    housekeeping.webhooks.add("proj_a", "http://127.0.0.1:1/hook")
    housekeeping.store.move(student.id, Status.CANCELLED, Event("over"))
    with housekeeping.background(0.01):
        try:
            assert counted.wait(10)
        finally:
            over.set()
