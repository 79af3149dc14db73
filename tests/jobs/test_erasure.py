"""Erasing a person's rows from a project's files."""

import json

import pytest
from sqlalchemy import select

from reft_ray.jobs.erasure import erase
from reft_ray.jobs.errors import ConflictError, InvalidError
from reft_ray.jobs.job import Event, JobSpec, Status
from reft_ray.jobs.models import ModelStore
from reft_ray.jobs.tables import audit_log
from reft_ray.jobs.tenants import OPERATOR
from reft_ray.rows.reader import validate

WHO = "ann.müller@example.org"


def row(text, **others):
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "hello"}], **others}


def lines(*rows, ascii=False):
    return b"".join(json.dumps(each, ensure_ascii=ascii).encode() + b"\n" for each in rows)


def stored(files, content, name="train.jsonl", purpose="fine-tune", project="proj_a", **options):
    return files.create(project, name, purpose, [content[i : i + 50] for i in range(0, len(content), 50)], **options).id


def test_only_the_rows_of_the_subject_go_and_all_others_stay_where_they_are(files, database):
    rows = [row("hi"), row(f"I am {WHO}."), row("hi", user=WHO), row("ann.muller"), row("last")]
    for ascii in (False, True):
        content = lines(*rows, ascii=ascii)
        file, other = stored(files, content), stored(files, content, project="proj_b")
        before = files.get(file, "proj_a")
        assert erase(files, "proj_a", WHO, OPERATOR, dry_run=True).files[file] == 2
        assert b"".join(files.read(file, "proj_a")) == content
        found = erase(files, "proj_a", WHO, OPERATOR)
        assert (found.rows, found.files, found.unread, found.models) == (2, {file: 2}, (), ())
        erased = b"".join(files.read(file, "proj_a"))
        assert [line.strip() for line in erased.split(b"\n")] == [
            line if index not in (1, 2) else b"" for index, line in enumerate(content.split(b"\n"))
        ]
        assert validate(erased) == []
        after = files.get(file, "proj_a")
        assert (after.bytes, len(erased)) == (before.bytes, before.bytes)
        assert after.sha256 != before.sha256
        assert b"".join(files.read(other, "proj_b")) == content
        assert erase(files, "proj_a", WHO, OPERATOR).rows == 0
        files.delete(file, "proj_a")
    with database.read() as connection:
        entries = connection.execute(select(audit_log.c.data).where(audit_log.c.type == "rows.erased")).scalars().all()
    assert [list(entry["files"].values()) for entry in entries] == [[2], [2]]
    assert WHO not in str(entries)


def test_withheld_rows_of_the_subject_are_erased_at_their_place(files):
    train = stored(files, lines(row("hi"), row(WHO)))
    withheld = [{"line": n, "decision": "block", **row(text)} for n, text in ((1, "x"), (2, WHO), (3, "y"))]
    content = lines(*withheld)
    quarantine = stored(files, content, "quarantine.jsonl", "fine-tune-results", parent_id=train)
    assert erase(files, "proj_a", WHO, OPERATOR).files == {train: 1, quarantine: 1}
    first, second, _ = (len(line) + 1 for line in content.splitlines())
    third = files.read_range(quarantine, "proj_a", first + second, 10_000)
    assert json.loads(third) == withheld[2]
    assert json.loads(files.read_range(quarantine, "proj_a", first, second)) == {"messages": [], "erased": True}


def test_files_of_other_formats_are_named(files):
    csv = stored(files, f"prompt,completion\n{WHO},hello\n".encode(), "rows.csv")
    stored(files, b"step,loss\n1,2\n", "step_metrics.csv", "fine-tune-results")
    assert erase(files, "proj_a", WHO, OPERATOR).unread == (csv,)


def test_a_file_in_use_is_left_whole_and_models_are_named(files, jobs, database):
    file, unused = stored(files, lines(row(WHO))), stored(files, lines(row(WHO)))
    job = jobs.create("org-a", "proj_a", JobSpec("tiny", file, 1), {})
    with pytest.raises(ConflictError, match=job.id):
        erase(files, "proj_a", WHO, OPERATOR)
    assert WHO.encode() in b"".join(files.read(unused, "proj_a"))
    with database.write() as connection:
        ModelStore(database).register_in(connection, job, "/adapter")
    jobs.move(job.id, Status.CANCELLED, Event("cancelled"))
    found = erase(files, "proj_a", WHO, OPERATOR)
    assert found.rows == 2
    assert len(found.models) == 1


def test_a_subject_that_names_everybody_is_refused(files):
    for subject in ("", "  a ", "ab"):
        with pytest.raises(InvalidError, match="at least 3"):
            erase(files, "proj_a", subject, OPERATOR)
