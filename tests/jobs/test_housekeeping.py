"""What happens now and then: students' files go, gauges stay, webhooks arrive over real HTTP."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import openai
import pytest

from reft_ray.jobs.audit import AuditLog
from reft_ray.jobs.files import FileStore, job_key, scratch_key
from reft_ray.jobs.housekeeping import SWEEP_SECONDS, Housekeeping
from reft_ray.jobs.job import Event, Status
from reft_ray.jobs.job_store import JobStore
from reft_ray.jobs.models import ModelStore
from reft_ray.jobs.tables import audit_log
from reft_ray.jobs.uploads import UploadStore
from reft_ray.jobs.webhooks import Webhooks
from reft_ray.telemetry import catalog
from reft_ray.telemetry.recorder import MemoryRecorder


@pytest.fixture
def house(sqlite_database, content):
    return Housekeeping(
        JobStore(sqlite_database, MemoryRecorder()),
        UploadStore(FileStore(sqlite_database, content)),
        ModelStore(sqlite_database),
        Webhooks(sqlite_database, allow_private=True),
        AuditLog(sqlite_database),
    )


@pytest.fixture
def student(house, spec):
    job = house.store.create("org-a", "proj_a", spec, {})
    house.files.content.write(f"{job_key('proj_a', job.id)}/adapter", [b"weights"])
    with house.store.database.write() as connection:
        house.models.register_in(connection, job, "uri")
    return job


def test_a_withdrawn_student_loses_its_files(house, student):
    key = f"{job_key('proj_a', student.id)}/adapter"
    house.tick()
    assert house.files.content.exists(key)
    house.models.delete(student.model_name, "proj_a")
    house.sweep()
    assert not house.files.content.exists(key)
    assert house.models.withdrawn() == []


@pytest.mark.parametrize(("end", "kept"), [(Status.SUCCEEDED, True), (Status.FAILED, False), (Status.CANCELLED, False)])
def test_an_ended_job_keeps_no_rows_and_only_a_released_student(house, spec, end, kept):
    job = house.store.create("org-a", "proj_a", spec, {})
    rows, adapter = scratch_key("proj_a", job.id) + "/kept.jsonl", job_key("proj_a", job.id) + "/adapter"
    for key in (rows, adapter):
        house.files.content.write(key, [b"x"])
    for status in (Status.QUEUED, Status.RUNNING):
        house.store.move(job.id, status, Event("on"))
    house.sweep()
    assert house.files.content.exists(rows)
    house.store.move(job.id, end, Event("over"))
    house.sweep()
    assert not house.files.content.exists(rows)
    assert house.files.content.exists(adapter) is kept
    assert house.store.to_clean() == []


def test_every_state_of_a_project_is_counted(house, student):
    house.tick()
    recorder = house.store.recorder
    assert recorder.total(catalog.JOBS, status="validating_files", project="proj_a") == 1
    house.store.move(student.id, Status.CANCELLED, Event("over"))
    house.tick()
    assert recorder.total(catalog.JOBS, status="validating_files") == 0
    assert recorder.total(catalog.JOBS, status="cancelled") == 1


def test_a_broken_audit_log_is_seen(house, clock):
    house.audit.append("file.created", {})
    house.tick()
    assert house.store.recorder.total(catalog.AUDIT_BREAKS) == 0
    with house.store.database.write() as connection:
        connection.execute(audit_log.update().values(type="nothing.happened"))
    clock.advance(SWEEP_SECONDS + 1)
    house.tick()
    assert house.store.recorder.total(catalog.AUDIT_BREAKS) == 1


def test_a_webhook_arrives(house, student, monkeypatch, clock):
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
        endpoint = house.webhooks.add("proj_a", f"http://127.0.0.1:{server.server_port}/hook")
        house.store.move(student.id, Status.CANCELLED, Event("over"))
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        house.tick()
        thread.join()
    monkeypatch.setattr("time.time", clock)
    event = openai.OpenAI(api_key="none", webhook_secret=endpoint.secret).webhooks.unwrap(*received[0])
    assert (event.type, event.data.id) == ("fine_tuning.job.cancelled", student.id)
    house.webhooks.remove(endpoint.id, "proj_a")
