"""Files, multipart uploads and their bytes."""

import hashlib

import pytest

from reft_ray.core.errors import UsageError
from reft_ray.jobs.content import ContentStore
from reft_ray.jobs.errors import ConflictError, InvalidError, NotFoundError, QuotaError, TooLargeError
from reft_ray.jobs.files import STALE_SECONDS, FileStore
from reft_ray.jobs.job import Event, JobSpec, Options, Status
from reft_ray.jobs.speeds import measured_speed
from reft_ray.jobs.uploads import JOIN_SECONDS, UploadStore


def make(files: FileStore, data: bytes = b"row\n", project: str = "proj_a", **more):
    return files.create(project, "rows.jsonl", "user_data", [data], **more)


def test_a_file_comes_back_byte_for_byte(files, clock):
    record = files.create("proj_a", "../../etc/rows\n.jsonl", "user_data", [b"\x00\xff", b"abc"], expires_after=3600)
    assert b"".join(files.read(record.id, "proj_a")) == b"\x00\xffabc"
    assert (record.bytes, record.filename, record.status) == (5, "rows.jsonl", "processed")
    assert record.sha256 == hashlib.sha256(b"\x00\xffabc").hexdigest()
    assert record.expires_at == clock() + 3600
    with pytest.raises(NotFoundError, match=f"No such File object: {record.id}"):
        files.read(record.id, "proj_b")


def test_lists_page_in_both_directions_and_by_purpose(files):
    made = [make(files).id for _ in range(3)]
    other = files.create("proj_a", "x", "batch", [b"1"]).id
    assert [item.id for item in files.list("proj_a").items] == [other, *made[::-1]]
    first = files.list("proj_a", limit=2, ascending=True, purpose="user_data")
    assert ([item.id for item in first.items], first.has_more) == (made[:2], True)
    assert [item.id for item in files.list("proj_a", after=made[1], ascending=True).items] == [made[2], other]


def test_files_made_from_a_file_are_deleted_with_it(files):
    parent = make(files)
    child = files.create("proj_a", "rejected.parquet", "fine-tune-results", [b"x"], parent_id=parent.id)
    files.delete(parent.id, "proj_a")
    for gone in (parent, child):
        with pytest.raises(NotFoundError):
            files.get(gone.id, "proj_a")
        assert not files.content.exists(f"proj_a/files/{gone.id}")


def test_an_expired_file_is_gone_at_once_and_its_bytes_after_the_sweep(files, clock):
    record = make(files, expires_after=3600)
    kept = make(files)
    clock.advance(3601)
    with pytest.raises(NotFoundError):
        files.get(record.id, "proj_a")
    assert files.sweep() == 1
    assert not files.content.exists(f"proj_a/files/{record.id}")
    assert b"".join(files.read(kept.id, "proj_a")) == b"row\n"


def test_a_file_that_is_too_large_leaves_nothing(database, content, tmp_path):
    files = FileStore(database, content, max_file_bytes=10, max_project_bytes=15)
    with pytest.raises(TooLargeError, match="10 bytes"):
        files.create("proj_a", "x", "user_data", [b"12345", b"678901"])
    assert files.list("proj_a").items == ()
    assert [path for path in (tmp_path / "content").rglob("*") if path.is_file()] == []
    make(files, b"1234567890")
    with pytest.raises(TooLargeError, match="5 bytes"):
        make(files, b"1234567890")
    make(files, b"12345")
    with pytest.raises(QuotaError, match="quota of 15 bytes"):
        make(files)


def test_an_interrupted_stream_leaves_nothing(files, clock):
    def broken():
        yield b"half"
        raise ConnectionError

    with pytest.raises(ConnectionError):
        files.create("proj_a", "x", "user_data", broken())
    assert files.list("proj_a").items == ()
    clock.advance(STALE_SECONDS + 1)
    assert files.sweep() == 0


def test_a_file_that_a_job_needs_stays(files, jobs):
    record = make(files)
    job = jobs.create("org-a", "proj_a", JobSpec(model="m", training_file=record.id, seed=1), {})
    with pytest.raises(ConflictError, match=job.id):
        files.delete(record.id, "proj_a")
    jobs.move(job.id, Status.CANCELLED, Event("cancelled"))
    files.delete(record.id, "proj_a")


@pytest.mark.parametrize("role", ["training_file", "validation_file"])
def test_a_file_that_a_job_needs_expires_when_the_job_has_ended(files, jobs, clock, role):
    record = make(files, expires_after=3600)
    child = make(files, parent_id=record.id)
    needed = {"training_file": "file-other", role: record.id}
    job = jobs.create("org-a", "proj_a", JobSpec(model="m", seed=1, **needed), {})
    elsewhere = make(files, project="proj_b", expires_after=3600)
    clock.advance(3601)
    assert files.sweep() == 1
    assert b"".join(files.read(record.id, "proj_a")) == b"row\n"
    assert {item.id for item in files.list("proj_a").items} == {record.id, child.id}
    assert not files.content.exists(f"proj_b/files/{elsewhere.id}")
    jobs.move(job.id, Status.CANCELLED, Event("cancelled"))
    with pytest.raises(NotFoundError):
        files.get(record.id, "proj_a")
    assert files.sweep() == 2


def test_a_jobs_spec_breaks_no_query(files, jobs, database):
    """SQLite cannot parse an infinity, PostgreSQL a NUL: one such row makes the whole query fail."""
    odd = {"options": Options(kd_weight=float("inf"))} if database.is_sqlite else {"suffix": "\0"}
    jobs.create("org-b", "proj_b", JobSpec("m", "file-other", 1, **odd), {})
    record = make(files)
    assert files.sweep() == 0
    files.delete(record.id, "proj_a")
    assert measured_speed(database, "m") is None


def test_a_file_that_is_replaced_does_not_count_twice(database, content):
    files = FileStore(database, content, max_project_bytes=5)
    for data in (b"12345", b"54321"):
        record = make(files, data, file_id="file-fixed")
    assert b"".join(files.read(record.id, "proj_a")) == b"54321"


def test_concurrent_files_share_the_quota(database, content, tmp_path):
    files = FileStore(database, content, max_project_bytes=10)

    def overtaken():
        yield b"123456"
        make(files, b"abcdef")

    with pytest.raises(QuotaError, match="quota has 4 bytes left, not 6"):
        files.create("proj_a", "rows.jsonl", "user_data", overtaken())
    (kept,) = files.list("proj_a").items
    assert b"".join(files.read(kept.id, "proj_a")) == b"abcdef"
    assert [path.name for path in (tmp_path / "content").rglob("*") if path.is_file()] == [kept.id]
    make(files, b"1234")


def test_the_same_id_written_twice_is_one_file(files):
    for data in (b"first", b"second"):
        files.create("proj_a", "report.json", "fine-tune-results", [data], file_id="file-fixed")
    assert [item.bytes for item in files.list("proj_a").items] == [6]


def test_a_write_that_fails_takes_no_other_record_with_it(files):
    def overtaken():
        yield b"half"
        make(files, b"whole", file_id="file-fixed")
        raise ConnectionError

    with pytest.raises(ConnectionError):
        files.create("proj_a", "x", "user_data", overtaken(), file_id="file-fixed")
    assert b"".join(files.read("file-fixed", "proj_a")) == b"whole"


def test_a_replacement_that_fails_leaves_no_bytes_behind(files):
    make(files, file_id="file-fixed")
    files.max_file_bytes = 3
    with pytest.raises(TooLargeError):
        make(files, file_id="file-fixed")
    assert files.list("proj_a").items == ()
    assert not files.content.exists("proj_a/files/file-fixed")


@pytest.mark.parametrize("key", ["../x", "a/../b", "/etc/passwd", "a//b", "", "a/.hidden", "a\\b", "a\n"])
def test_no_key_leaves_the_content_tree(content, key):
    with pytest.raises(ValueError, match="plain relative path"):
        content.write(key, [b"x"])


def test_a_store_that_is_no_uri_is_refused():
    with pytest.raises(UsageError, match="file store 'relative/path'"):
        ContentStore("relative/path")


def test_options_of_a_file_store_are_refused():
    with pytest.raises(UsageError, match="file store 's3://bucket': it takes no options; name an S3 server by AWS_"):
        ContentStore("s3://bucket?endpoint_override=127.0.0.1:9000")


def test_an_upload_becomes_one_file(files):
    uploads = UploadStore(files)
    upload = uploads.create("proj_a", "big.jsonl", "user_data", 6, "text/jsonl")
    second, _ = uploads.add_part(upload.id, "proj_a", [b"def"])
    first, _ = uploads.add_part(upload.id, "proj_a", [b"abc"])
    digest = hashlib.md5(b"abcdef", usedforsecurity=False).hexdigest()
    done, record = uploads.complete(upload.id, "proj_a", [first, second], digest)
    assert b"".join(files.read(record.id, "proj_a")) == b"abcdef"
    assert (done.status, done.file_id) == ("completed", record.id)
    assert uploads.complete(upload.id, "proj_a", [first, second])[1].id == record.id
    with pytest.raises(ConflictError, match="is completed"):
        uploads.add_part(upload.id, "proj_a", [b"x"])
    assert not files.content.exists(f"proj_a/uploads/{upload.id}/{first}")


def test_the_parts_of_an_upload_have_the_room_that_it_was_opened_for(files, tmp_path):
    uploads = UploadStore(files)
    upload = uploads.create("proj_a", "x", "user_data", 7, "text/plain")
    first, _ = uploads.add_part(upload.id, "proj_a", [b"abc"])

    def beside_another():
        yield b"d"
        uploads.add_part(upload.id, "proj_a", [b"1234"])
        yield b"ef"

    for too_much in (beside_another(), [b"12345678"]):
        with pytest.raises(TooLargeError):
            uploads.add_part(upload.id, "proj_a", too_much)
    again, _ = uploads.add_part(upload.id, "proj_a", [b"abc"])
    assert again == first
    assert sorted(path.stat().st_size for path in (tmp_path / "content").rglob("*") if path.is_file()) == [3, 4]


def test_a_part_that_comes_too_late_leaves_nothing(files, tmp_path, monkeypatch):
    uploads, write = UploadStore(files), files.content.write
    upload = uploads.create("proj_a", "x", "user_data", 3, "text/plain")

    def overtaken(*what):
        uploads.cancel(upload.id, "proj_a")
        return write(*what)

    monkeypatch.setattr(files.content, "write", overtaken)
    with pytest.raises(ConflictError, match="closed before"):
        uploads.add_part(upload.id, "proj_a", [b"abc"])
    assert [path for path in (tmp_path / "content").rglob("*") if path.is_file()] == []


def test_an_open_upload_counts_against_the_quota(database, content):
    files = FileStore(database, content, max_project_bytes=10)
    uploads = UploadStore(files)
    with pytest.raises(QuotaError, match="quota has 10 bytes left, not 11"):
        uploads.create("proj_a", "x", "user_data", 11, "text/plain")
    upload = uploads.create("proj_a", "x", "user_data", 8, "text/plain")
    with pytest.raises(TooLargeError, match="2 bytes"):
        make(files, b"123")
    with pytest.raises(QuotaError, match="quota has 2 bytes left, not 3"):
        uploads.create("proj_a", "y", "user_data", 3, "text/plain")
    make(files, b"123", project="proj_b")
    make(files, b"12")
    part, _ = uploads.add_part(upload.id, "proj_a", [b"12345678"])
    assert uploads.complete(upload.id, "proj_a", [part])[1].bytes == 8
    with pytest.raises(QuotaError, match="quota of 10 bytes"):
        uploads.create("proj_a", "y", "user_data", 1, "text/plain")
    for item in files.list("proj_a").items:
        files.delete(item.id, "proj_a")
    uploads.cancel(uploads.create("proj_a", "y", "user_data", 10, "text/plain").id, "proj_a")
    make(files, b"1234567890")


def test_an_upload_is_joined_by_one_request_at_a_time(files, monkeypatch):
    uploads, read = UploadStore(files), files.content.read
    upload = uploads.create("proj_a", "x", "user_data", 6, "text/plain")
    parts = [uploads.add_part(upload.id, "proj_a", [data])[0] for data in (b"abc", b"def")]
    refused = []

    def interrupted(key):
        for late in (lambda: uploads.complete(upload.id, "proj_a", parts), lambda: uploads.cancel(upload.id, "proj_a")):
            with pytest.raises(ConflictError, match="is being completed; ask again") as caught:
                late()
            refused.append(caught.value.code)
        return read(key)

    with monkeypatch.context() as patch:
        patch.setattr(files.content, "read", interrupted)
        done, record = uploads.complete(upload.id, "proj_a", parts)
    assert refused == ["upload_not_pending"] * 4
    assert b"".join(files.read(record.id, "proj_a")) == b"abcdef"
    assert uploads.complete(upload.id, "proj_a", parts) == (done, record)


def test_an_upload_whose_gateway_died_while_joining_is_not_stuck(files, clock):
    uploads = UploadStore(files)
    upload, other = (uploads.create("proj_a", "x", "user_data", 3, "text/plain") for _ in range(2))
    part, _ = uploads.add_part(upload.id, "proj_a", [b"abc"])
    for left in (upload, other):
        uploads._claim(left)
    clock.advance(JOIN_SECONDS - 1)
    with pytest.raises(ConflictError, match="being completed"):
        uploads.complete(upload.id, "proj_a", [part])
    clock.advance(2)
    _, record = uploads.complete(upload.id, "proj_a", [part])
    assert b"".join(files.read(record.id, "proj_a")) == b"abc"
    clock.advance(3601)
    assert uploads.sweep() == 1
    assert uploads.get(other.id, "proj_a").status == "expired"


def test_an_upload_whose_parts_do_not_fit_is_refused(files, clock):
    uploads = UploadStore(files, max_bytes=10)
    with pytest.raises(TooLargeError):
        uploads.create("proj_a", "x", "user_data", 11, "text/plain")
    upload = uploads.create("proj_a", "x", "user_data", 4, "text/plain")
    part, _ = uploads.add_part(upload.id, "proj_a", [b"abc"])
    with pytest.raises(InvalidError, match="3 bytes"):
        uploads.complete(upload.id, "proj_a", [part])
    with pytest.raises(InvalidError, match="no part"):
        uploads.complete(upload.id, "proj_a", ["part_x"])
    with pytest.raises(TooLargeError):
        uploads.add_part(upload.id, "proj_a", [b"12345678"])
    with pytest.raises(NotFoundError):
        uploads.get(upload.id, "proj_b")
    rest, _ = uploads.add_part(upload.id, "proj_a", [b"d"])
    with pytest.raises(InvalidError, match="md5"):
        uploads.complete(upload.id, "proj_a", [part, rest], "0" * 32)
    assert files.list("proj_a").items == ()
    clock.advance(3601)
    assert uploads.sweep() == 1
    assert uploads.get(upload.id, "proj_a").status == "expired"


@pytest.mark.parametrize(
    ("name", "data", "fault"),
    [
        ("a.jsonl", b'{"messages": []}\n[1]\n', "Line 2 is not a dictionary"),
        ("a.jsonl", b"prompt,completion\n1,2\n", "Line 1 is not a dictionary"),
        ("a.jsonl", b'{"messages": []}\n' * 20_000 + b'{"messages": [}\n{}\n', "Line 20001 is not a dictionary"),
        ("a.jsonl", b'{"messages": []}\n' * 20_000 + b'{"cut off": "he', "Line 20001 is not a dictionary"),
        ("a.jsonl", b'{"messages": []}\n' * 20_000 + b"plain text " * 9_000, "Line 20001 is not a dictionary"),
        ("a.jsonl", b'{"messages": []}\n{"a": "' + b"x" * (9 << 20) + b'"}\n', "Line 2 is longer than 8,388,608 bytes"),
        ("a.jsonl", b"", "empty"),
        ("a.jsonl", b" \n\n", "blank"),
        ("upload", b"%PDF-1.7", "is a PDF"),
        ("a.jsonl", b"[" * 100_000, "Line 1"),
        ("a.jsonl", b'{"messages": []}\nnope\n' + b'{"a": 1}\n' * 20_000, "Line 2"),
    ],
)
def test_a_training_file_that_no_job_could_use_is_refused_while_it_arrives(files, name, data, fault):
    with pytest.raises(InvalidError, match=fault) as caught:
        files.create("proj_a", name, "fine-tune", [data[i : i + 7000] for i in range(0, len(data), 7000)])
    assert caught.value.code == "invalid_file_format"
    assert files.list("proj_a").items == ()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", b'\xef\xbb\xbf{"messages": []}\r\n\n{"messages": []}'),
        ("a.csv", b"prompt,completion\n"),
        ("a.jsonl", b'{"text": "' + b"x" * 200_000 + b'"}\n{}'),
    ],
)
def test_a_training_file_arrives_unchanged(files, name, data):
    record = files.create("proj_a", name, "fine-tune", [data])
    assert b"".join(files.read(record.id, "proj_a")) == data
