"""`/v1/files` and `/v1/uploads` through the openai client."""

import hashlib

import httpx
import openai
import pytest


def test_a_file_is_uploaded_and_downloaded(client, rows):
    made = client.files.create(
        file=("train.jsonl", rows), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert made.id.startswith("file-")
    assert (made.object, made.bytes, made.filename, made.purpose) == ("file", len(rows), "train.jsonl", "fine-tune")
    assert made.expires_at == made.created_at + 3600
    assert client.files.wait_for_processing(made.id).status == "processed"
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).content == rows
    gone = client.files.delete(made.id)
    assert (gone.id, gone.deleted, gone.object) == (made.id, True, "file")
    with pytest.raises(openai.NotFoundError) as caught:
        client.files.retrieve(made.id)
    assert caught.value.body["message"] == f"No such File object: {made.id}"
    assert (caught.value.param, caught.value.code) == ("id", None)
    assert caught.value.request_id.startswith("req_")


def test_lists_page_through_45_files_in_both_orders(service, rows):
    client = service.client("many-files")
    made = [client.files.create(file=(f"{n}.jsonl", rows), purpose="fine-tune").id for n in range(45)]
    other = client.files.create(file=("x.txt", b"x"), purpose="user_data").id
    assert [item.id for item in client.files.list(limit=20, order="asc", purpose="fine-tune")] == made
    assert [item.id for item in client.files.list(limit=20)] == [other, *made[::-1]]
    page = client.files.list(limit=2).model_dump()
    assert (page["has_more"], page["first_id"], page["last_id"]) == (True, other, made[-1])
    with pytest.raises(openai.BadRequestError, match="no item 'file-none'"):
        client.files.list(after="file-none")


@pytest.mark.parametrize(
    ("name", "data", "purpose", "message", "code"),
    [
        ("a.jsonl", b"[1]\n", "fine-tune", "Line 1 is not a dictionary", "invalid_file_format"),
        ("a.jsonl", b"", "fine-tune", "empty", "invalid_file_format"),
        ("a.jsonl", b"{}\n", "fine-tune-results", "is not one of", "invalid_value"),
    ],
)
def test_a_useless_file_is_refused_at_upload(client, name, data, purpose, message, code):
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        client.files.create(file=(name, data), purpose=purpose)
    assert caught.value.code == code


def test_a_file_above_the_limit_is_413(client, service):
    before = len(client.files.list().data)
    for size in ((2 << 20) + 1, 4 << 20):
        with pytest.raises(openai.APIStatusError) as caught:
            client.files.create(file=("big.jsonl", b"{" + b" " * (size - 3) + b"}\n"), purpose="fine-tune")
        assert (caught.value.status_code, caught.value.code) in {(413, "file_too_large"), (413, None)}
    assert len(client.files.list().data) == before


def test_a_body_that_is_not_a_form_is_400(service):
    headers = {"authorization": f"Bearer {service.secret()}"}
    for content, kind in ((b"{}", "application/json"), (b"--x\r\n", "multipart/form-data"), (b"", "text/plain")):
        answer = httpx.post(f"{service.url}/v1/files", content=content, headers={**headers, "content-type": kind})
        assert answer.status_code == 400
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_an_upload_in_parts_becomes_a_file(client, rows):
    upload = client.uploads.create(bytes=len(rows), filename="p.jsonl", mime_type="text/jsonl", purpose="fine-tune")
    assert (upload.object, upload.status) == ("upload", "pending")
    second = client.uploads.parts.create(upload.id, data=rows[100:])
    first = client.uploads.parts.create(upload.id, data=rows[:100])
    assert (first.object, first.upload_id) == ("upload.part", upload.id)
    done = client.uploads.complete(
        upload.id, part_ids=[first.id, second.id], md5=hashlib.md5(rows, usedforsecurity=False).hexdigest()
    )
    assert done.status == "completed"
    assert client.files.content(done.file.id).content == rows


def test_an_upload_can_be_cancelled_once(client):
    upload = client.uploads.create(bytes=5, filename="p", mime_type="text/plain", purpose="user_data")
    assert client.uploads.cancel(upload.id).status == "cancelled"
    with pytest.raises(openai.ConflictError) as caught:
        client.uploads.cancel(upload.id)
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_upload_file_chunked_works(client, rows):
    done = client.uploads.upload_file_chunked(
        file=rows, filename="c.jsonl", bytes=len(rows), mime_type="text/jsonl", purpose="fine-tune"
    )
    assert client.files.content(done.file.id).content == rows


def test_a_file_of_another_project_does_not_exist(client, service, training_file):
    stranger = service.client("stranger")
    for call in (stranger.files.retrieve, stranger.files.content, stranger.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(training_file)
    assert training_file not in [item.id for item in stranger.files.list()]
    assert client.files.retrieve(training_file).id == training_file
