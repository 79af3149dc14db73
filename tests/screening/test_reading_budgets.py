"""A small file gives a bounded number of bytes, rows and faults, counted while they are read."""

import gzip
import io
import json

import pyarrow.parquet as pq
import pytest
import zstandard

from reft_ray.core.errors import UsageError
from reft_ray.pipeline import validate
from reft_ray.rows.checks import Fault
from reft_ray.rows.reader import MAX_FAULTS, RowReader
from reft_ray.screening import columnar, inflating
from reft_ray.screening.dataset import screen
from reft_ray.screening.ranges import Limits
from reft_ray.screening.reading import plan_files
from reft_ray.screening.sources import find_sources
from reft_ray.testbed.word_scorer import WordScorer

ROW = b'{"prompt": "tea?", "response": "yes"}\n'
PACK = {"gz": gzip.compress, "zst": lambda data: zstandard.compress(data, 19)}


def plan(path) -> None:
    plan_files(find_sources([str(path)]), Limits())


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("unit", [ROW, b'{"messages":0}\n', b"\n", b"x", b"[[[", b'"a,b"\n'])
@pytest.mark.parametrize("container", ["jsonl", "csv", "json"])
def test_a_file_that_inflates_too_much_is_refused_before_its_end(
    tmp_path, monkeypatch, suffix: str, unit: bytes, container: str
) -> None:
    monkeypatch.setattr(inflating, "FREE_BYTES", 1 << 20)
    # Its end is damaged: a reader that gets that far reports that instead.
    data = PACK[suffix](unit * ((12 << 20) // len(unit)))[:-40]
    path = tmp_path / f"rows.{container}.{suffix}"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"more than .* bytes once decompressed|malformed|element|not json"):
        plan(path)


@pytest.mark.parametrize("suffix", PACK)
def test_rows_of_one_template_pass(tmp_path, suffix: str) -> None:
    rows = b"".join(b'{"prompt": "Classify this: %d", "response": "positive"}\n' % number for number in range(20_000))
    (tmp_path / f"rows.jsonl.{suffix}").write_bytes(PACK[suffix](rows))
    plan(tmp_path / f"rows.jsonl.{suffix}")


def test_blank_lines_are_not_rows_without_end(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(inflating, "FREE_ROWS", 1000)
    (tmp_path / "rows.jsonl").write_bytes(ROW + b"\n" * 100_000)
    with pytest.raises(UsageError, match=r"rows\.jsonl: 100,001 rows in 100,038 bytes"):
        plan(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_bytes((ROW + b"\n") * 2000)
    plan(tmp_path / "rows.jsonl")


def test_a_file_that_takes_all_memory_is_an_error_of_one_line(tmp_path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(columnar, "json_elements", fail)
    (tmp_path / "rows.json").write_text('[{"prompt": "tea?"}]')
    with pytest.raises(UsageError, match=r"rows\.json: damaged file: MemoryError"):
        plan(tmp_path / "rows.json")


def test_the_faults_of_a_row_are_bounded_and_its_bytes_are_kept_once(tmp_path) -> None:
    bad = json.dumps({"messages": [{"role": "nobody", "content": 1}] * 5000})
    faults = RowReader().read_line(bad.encode())
    assert len(faults) == MAX_FAULTS + 1
    assert faults[-1].code == "too_many_faults"
    path = tmp_path / "rows.jsonl"
    chat_turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text(f"{json.dumps({'messages': chat_turns})}\n{bad}\n")
    screen([str(path)], str(tmp_path / "out"), WordScorer)
    (part,) = tmp_path.glob("out/invalid/*.parquet")
    raws = [raw for raw in pq.read_table(part)["raw"].to_pylist() if raw is not None]
    assert raws.count(bad.encode()) == 1


def test_a_validation_report_is_full_at_some_time(monkeypatch) -> None:
    fault = (Fault("messages", "data_type", "not a list", "give a list"),)
    by_rows = validate._Tally(io.BytesIO())
    while not by_rows.full:
        by_rows.add_faults("training_file", 1, fault)
    assert by_rows.errors == validate.MAX_INVALID_ROWS
    by_bytes = validate._Tally(io.BytesIO())
    while not by_bytes.full:
        by_bytes.add_faults("training_file", 1, fault * 1000)
    assert by_bytes.report.tell() < validate.MAX_REPORT_BYTES + 200_000
    monkeypatch.setattr(validate, "MAX_SECONDS", -1.0)
    by_rows.rows = 255
    with pytest.raises(UsageError, match="split it"):
        by_rows.add_row()
