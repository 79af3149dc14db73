"""Files of jobs: read as their owners say, refused under their owners' names, and never a server error."""

import json

import pytest

from reft_ray.jobs.job import Status
from reft_ray.pipeline.steps import make
from reft_ray.pipeline.validate import validate_files

ASKED = {"role": "user", "content": "how to bake a bread"}
ANSWERED = {"role": "assistant", "content": "sure here is bread"}
ROW = {"messages": [ASKED, ANSWERED]}
CALL = {"id": "c1", "type": "function", "function": {"name": "get", "arguments": '{"city": "Oslo"}'}}
CALLING = [ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}]


def lines(*rows) -> bytes:
    return b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)


def validated(harness, toy, content: bytes, **options):
    """The validation of a job's file, and its report."""
    harness.grant()
    run = harness.run(harness.job(content, **options))
    found = validate_files(run, str(toy.base), 1)
    report = harness.content(found.report_file) if found.report_file else b""
    return found, [json.loads(line) for line in report.splitlines()]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "assistant", "content": "hello"}, ASKED, ANSWERED]},
        {"messages": CALLING},
        {"messages": [*CALLING, {"role": "tool", "tool_call_id": "c1", "content": "4"}, ANSWERED]},
        {"messages": [ASKED, {"role": "assistant", "content": "", "function_call": CALL["function"]},
                      {"role": "function", "name": "get", "content": "4"}, ANSWERED]},
        {"system": "tell", "messages": [ASKED, ANSWERED]},
        {"question": "how", "chosen": "sure", "rejected": "sorry"},
    ],
)  # fmt: skip
def test_a_row_is_learned_or_refused_with_its_line(harness, toy, row):
    found, report = validated(harness, toy, lines(ROW if "messages" in row else row, row))
    assert found.tokens > 0
    assert {entry["line"] for entry in report} <= {2}
    if found.errors:
        assert report[0]["code"] == "chat_template"
        assert report[0]["message"]


def test_a_job_takes_the_options_of_the_command(harness, toy):
    both = {"prompt": "how", "chosen": [ASKED, ANSWERED], "rejected": [ASKED, ANSWERED], "messages": [ASKED, ANSWERED]}
    assert validated(harness, toy, lines(both), format="chat")[0].errors == 0
    named = {"ask": "how", "reply": "sure"}
    columns = {"prompt": "ask", "response": "reply"}
    assert validated(harness, toy, lines(named), columns=columns)[0].errors == 0
    dialogue = {"conversations": [{"from": "Q", "value": "how"}, {"from": "A", "value": "sure"}]}
    speakers = {"Q": "user", "A": "assistant"}
    assert validated(harness, toy, lines(dialogue), speakers=speakers)[0].errors == 0


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.parquet", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        ("rows.json", b"<!DOCTYPE html><html></html>", "an HTML page"),
        ("rows.jsonl.gz", b"\x1f\x8bbroken", "damaged gzip"),
        ("both.jsonl", lines({"messages": [ASKED, ANSWERED], "chosen": "a", "rejected": "b"}), '"format": "chat"'),
        ("rows.csv", b"prompt,completion\ncaf\xe9,ok\n", "line 2: the byte 0xe9, é in Windows-1252 at column 4"),
    ],
)
def test_a_file_that_cannot_be_read_fails_the_job_under_its_owners_name(harness, toy, name, content, said):
    job = harness.drive(harness.job(content, name=name), make(**toy.options))
    assert (job.status, job.error.code) == (Status.FAILED, "invalid_training_file")
    assert name in job.error.message
    assert said in job.error.message
    assert "/content" not in job.error.message


def test_invalid_rows_fail_the_job_or_are_skipped_as_asked(harness, toy):
    content = lines(*[ROW] * 12, {"messages": "none"})
    job = harness.drive(harness.job(content), make(**toy.options))
    assert "first error: missing_messages_list, line 13: messages: messages is not a" in job.error.message
    found, report = validated(harness, toy, content, skip_invalid=True)
    assert (found.rows, found.errors, report[0]["line"]) == (13, 1, 13)
    job = harness.drive(harness.job(content, skip_invalid=True), make(**toy.options))
    assert (job.error, job.status) == (None, Status.SUCCEEDED)
