"""What is checked holds when it is done, and what is done is in the audit log: one transaction each."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from reft_ray.jobs.audit import AuditLog
from reft_ray.jobs.errors import ConflictError, InvalidError
from reft_ray.jobs.job import Event, JobSpec, Status
from reft_ray.jobs.models import ModelStore
from reft_ray.jobs.tenants import OPERATOR, Tenants
from reft_ray.jobs.uploads import UploadStore
from reft_ray.jobs.webhooks import Webhooks

ROW = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}\n'


def spec_of(file_id):
    return JobSpec(model="tiny", training_file=file_id, seed=1)


def create(jobs, files, file_id, **options):
    spec = spec_of(file_id)

    def admit(connection):
        files.check_usable_in(connection, "proj_a", spec.training_file, spec.validation_file)

    return jobs.create("org-a", "proj_a", spec, {}, admit=admit, **options)


def test_a_job_and_the_deletion_of_its_file_exclude_each_other(jobs, files):
    """The deletion starts while the job is being created: it waits, and then sees the job."""
    record = files.create("proj_a", "a.jsonl", "fine-tune", [ROW])
    deleting = threading.Event()

    def delete():
        deleting.set()
        files.delete(record.id, "proj_a")

    with ThreadPoolExecutor(1) as pool:
        waits = []

        def admit(connection):
            files.check_usable_in(connection, "proj_a", record.id, None)
            waits.append(pool.submit(delete))
            assert deleting.wait(10)

        jobs.create("org-a", "proj_a", spec_of(record.id), {}, admit=admit)
        with pytest.raises(ConflictError, match="used by job"):
            waits[0].result(30)
    assert files.get(record.id, "proj_a").id == record.id


def test_no_job_is_created_on_a_file_that_is_gone(jobs, files, clock):
    gone = files.create("proj_a", "a.jsonl", "fine-tune", [ROW])
    files.delete(gone.id, "proj_a")
    late = files.create("proj_a", "a.jsonl", "fine-tune", [ROW], expires_after=3600)
    clock.advance(3601)
    for file_id in (gone.id, late.id, "file-other"):
        with pytest.raises(InvalidError) as refused:
            create(jobs, files, file_id)
        assert (refused.value.param, refused.value.code) == ("training_file", "invalid_training_file")
    assert jobs.list("proj_a").items == ()


def test_a_sweep_that_has_read_its_list_spares_the_file_that_a_job_has_come_to_need(jobs, files, clock, monkeypatch):
    record = files.create("proj_a", "a.jsonl", "fine-tune", [ROW], expires_after=3600)
    locking = files.database.write
    created = []

    def write(*args):
        if not created:
            created.append(True)
            clock.advance(-10)
            create(jobs, files, record.id)
            clock.advance(10)
        return locking(*args)

    clock.advance(3601)
    monkeypatch.setattr(files.database, "write", write)
    assert files.sweep() == 0
    assert b"".join(files.read(record.id, "proj_a")) == ROW


@pytest.fixture
def deeds(database, jobs, files):
    """Every deed of a project, each as a call and what shows that it was done."""
    Tenants(database).create_key("acme", "a", "key")
    key, _ = Tenants(database).create_key("acme", "b", "key")
    uploads, models, webhooks = UploadStore(files), ModelStore(database), Webhooks(database, allow_private=True)
    kept = files.create("proj_a", "a.jsonl", "fine-tune", [ROW])
    free = files.create("proj_a", "b.jsonl", "fine-tune", [ROW])
    job = create(jobs, files, kept.id)
    with database.write() as connection:
        models.register_in(connection, job, "uri")
    opened = uploads.create("proj_a", "c.jsonl", "fine-tune", len(ROW), "text/plain")
    part, _ = uploads.add_part(opened.id, "proj_a", [ROW])
    endpoint = webhooks.add("proj_a", "http://127.0.0.1:1/hook")
    owner = job.project_id

    def state():
        return (
            [file.id for file in files.list(owner).items],
            [(each.id, each.status) for each in jobs.list(owner).items],
            [model.id for model in models.list(owner)],
            [each.id for each in webhooks.list(owner)],
            uploads.get(opened.id, owner).status,
        )

    calls = {
        "file.created": lambda: files.create(owner, "d.jsonl", "fine-tune", [ROW], actor=OPERATOR),
        "file.deleted": lambda: files.delete(free.id, owner, OPERATOR),
        "upload": lambda: uploads.complete(opened.id, owner, [part], actor=OPERATOR),
        "job.created": lambda: create(jobs, files, kept.id, actor=OPERATOR),
        "job.cancelled": lambda: jobs.move(job.id, Status.CANCELLED, Event("cancelled"), actor=OPERATOR),
        "webhook_endpoint.created": lambda: webhooks.add(owner, "http://127.0.0.1:1/x", actor=OPERATOR),
        "webhook_endpoint.deleted": lambda: webhooks.remove(endpoint.id, owner, OPERATOR),
        "model.deleted": lambda: models.delete(job.model_name, owner, OPERATOR),
    }
    return calls, state, key


def test_nothing_is_done_that_the_audit_log_cannot_record(deeds, database, monkeypatch):
    calls, state, _ = deeds
    before, entries = state(), AuditLog(database).verify().entries

    def full(self, *args):
        raise OSError("disk full")

    monkeypatch.setattr(AuditLog, "append_in", full)
    for name, call in calls.items():
        with pytest.raises(OSError, match="disk full"):
            call()
        assert state() == before, name
    monkeypatch.undo()
    for number, (name, call) in enumerate(calls.items(), 1):
        call()
        assert AuditLog(database).verify().entries == entries + number, name
    assert AuditLog(database).verify().fault is None


def test_a_completion_that_is_repeated_is_recorded_once(files, database):
    uploads = UploadStore(files)
    opened = uploads.create("proj_a", "c.jsonl", "fine-tune", len(ROW), "text/plain")
    part, _ = uploads.add_part(opened.id, "proj_a", [ROW])
    first = uploads.complete(opened.id, "proj_a", [part], actor=OPERATOR)
    assert uploads.complete(opened.id, "proj_a", [part], actor=OPERATOR) == first
    assert [entry.type for entry in AuditLog(database).entries()] == ["file.created"]


def test_an_idempotency_key_stands_for_one_request(jobs):
    spec = spec_of("file-1")
    first = jobs.create("org-a", "proj_a", spec, {"a": "b"}, request_key="k", seeded=True)
    assert jobs.create("org-a", "proj_a", spec, {"a": "b"}, request_key="k", seeded=True) == first
    other = JobSpec(model="tiny", training_file="file-1", seed=2)
    for changed, metadata in ((spec, {"a": "c"}), (spec, {}), (other, {"a": "b"})):
        with pytest.raises(ConflictError, match="different request"):
            jobs.create("org-a", "proj_a", changed, metadata, request_key="k", seeded=True)
