"""Inputs and outputs on S3, here a local server."""

import gzip
import json

import pytest

from reft_ray.core.errors import BlockedByPolicyError, UsageError
from reft_ray.screening.config import Policy, ScreenConfig
from reft_ray.screening.dataset import screen
from reft_ray.screening.kept_rows import kept_rows
from reft_ray.screening.ranges import Limits
from reft_ray.screening.report import load_report
from reft_ray.screening.reviews import Action, Reviews, Summary
from reft_ray.screening.sources import filesystem_of, find_sources
from reft_ray.telemetry import catalog
from reft_ray.telemetry.recorder import MemoryRecorder
from reft_ray.testbed.word_scorer import WordScorer

moto = pytest.importorskip("moto.server", reason="moto is not installed")


@pytest.fixture(scope="module")
def bucket():
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    query = f"?scheme=http&endpoint_override={host}:{port}&region=us-east-1&allow_bucket_creation=true"
    filesystem, _ = filesystem_of(f"s3://key:secret@rows{query}")
    filesystem.create_dir("rows")
    yield f"s3://key:secret@rows/{{}}{query}"
    server.stop()


def put(bucket, name, content):
    filesystem, path = filesystem_of(bucket.format(name))
    with filesystem.open_output_stream(path, compression=None) as stream:
        stream.write(content)


def test_globs_and_folders_find_objects_and_hide_credentials(bucket):
    for name in ("many/a.jsonl", "many/b.jsonl", "many/notes.txt"):
        put(bucket, name, b'{"prompt": "a", "response": "b"}\n')
    found = find_sources([bucket.format("many/*.jsonl")])
    assert [source.name for source in found] == ["s3://rows/many/a.jsonl", "s3://rows/many/b.jsonl"]
    assert find_sources([bucket.format("many")]) == found
    with pytest.raises(UsageError) as refused:
        find_sources([bucket.format("many/*.csv")])
    assert "secret" not in str(refused.value)


def test_a_screening_from_s3_to_s3(bucket):
    rows = [{"prompt": f"{'bomb' if index % 10 == 0 else 'tea'} {index}", "response": "x"} for index in range(100)]
    raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
    put(bucket, "in/rows.jsonl", raw)
    put(bucket, "in/rows.jsonl.gz", gzip.compress(raw))
    out = bucket.format("out")
    config = ScreenConfig(limits=Limits(rows=30))
    report = screen([bucket.format("in/*")], out, WordScorer, config)
    assert report.counts == (180, 0, 20, 0)
    assert load_report(out) == report == screen([bucket.format("in/*")], out, WordScorer, config)
    assert [number for number, _ in kept_rows(out)] == [n + 1 for n in range(200) if n % 10]
    filesystem, path = filesystem_of(out)
    with filesystem.open_input_stream(f"{path}/kept/part-00000-000000.jsonl") as stream:
        assert stream.read() == b"".join(line for n, line in enumerate(raw.splitlines(True)[:30]) if n % 10)
    for name in ("report.json", "report.html", ".screen/manifest.json"):
        with filesystem.open_input_stream(f"{path}/{name}") as stream:
            assert b"secret" not in stream.read()


def test_a_review_in_a_bucket(bucket):
    rows = [{"prompt": f"{'bomb' if index % 10 == 0 else 'tea'} {index}", "response": "x"} for index in range(30)]
    put(bucket, "review/rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    out = bucket.format("reviewed")
    with pytest.raises(BlockedByPolicyError, match="3 withheld rows wait"):
        screen([bucket.format("review/rows.jsonl")], out, WordScorer, ScreenConfig(policy=Policy.REVIEW))
    recorder = MemoryRecorder()
    Reviews(out, recorder).decide([1], Action.APPROVE, "ada", "fine")
    Reviews(out, recorder).decide([11, 21], Action.REJECT, "bob", "harmful")
    Reviews(out, recorder).decide([21], Action.APPROVE, "ada", "second look")
    assert Reviews(out).summary() == Summary(withheld=3, pending=0, approved=2, rejected=1, overturn_rate=2 / 3)
    assert len(recorder.observations(catalog.REVIEW_AGE)) == 4
    assert [number for number, _ in kept_rows(out) if number % 10 == 1] == [1, 21]
