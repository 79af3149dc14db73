"""`reft-ray validate`: every error with its line, the copy of --fix, and the work shared between processes."""

import json

import pytest
from typer.testing import CliRunner

from reft_ray.cli.main import app
from reft_ray.rows.reader import RowReader
from reft_ray.screening import reading
from reft_ray.screening.sources import find_sources
from reft_ray.screening.validation import Validated, validate_source

TURNS = [{"role": "user", "content": "How do I water a fern?"}, {"role": "assistant", "content": "Once a week."}]
ROW = json.dumps({"messages": TURNS}).encode()


def validate(*arguments):
    return CliRunner().invoke(app, ["validate", *map(str, arguments)])


def test_every_error_is_named_with_its_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([ROW, b"{'a': 1}", b"", b'{"messages": []}', ROW]) + b"\n")
    result = validate(path)
    assert result.exit_code == 1
    assert [line.partition(" (")[0] for line in result.stdout.splitlines()[:2]] == [
        f"{path}:2: invalid_json: not valid JSON at column 2: a single quote: the line is Python and not JSON",
        f"{path}:4: missing_messages_list: messages: messages is not a non-empty list",
    ]
    assert "4 rows of the format chat, 2 invalid" in result.stdout
    assert "2 rows are invalid" in result.stderr
    (document,) = json.loads(validate(path, "--json", "--limit", 1).stdout)
    assert (document["rows"], document["invalid"], [line["line"] for line in document["lines"]]) == (4, 2, [2])


def test_processes_share_a_file_and_keep_its_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "GROUP_BYTES", 1 << 12)
    path = tmp_path / "rows.jsonl"
    bad = [7, 4000, 30_000]
    path.write_bytes(b"".join((b"{" if number in bad else ROW) + b"\n" for number in range(1, 30_001)))
    total = Validated()
    (source,) = find_sources([str(path)])
    assert [line for line, _ in validate_source(source, RowReader(), total, workers=2)] == bad
    assert (total.rows, total.invalid, total.codes["invalid_json"]) == (30_000, 3, 3)


@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        ("python.jsonl", repr({"messages": TURNS}).encode(), ()),
        ("commas.jsonl", ROW[:-1] + b",}", ()),
        ("nan.jsonl", ROW[:-1] + b', "score": NaN}', ()),
        ("marked.jsonl", b"\xef\xbb\xbf" + ROW, ()),
        ("utf16.jsonl", ROW.decode().encode("utf-16"), ()),
        ("indented.json", json.dumps([{"messages": TURNS}], indent=2).encode(), ()),
        ("array.jsonl", b"[" + ROW + b",]", ()),
        ("cp1252.jsonl", ROW.replace(b"fern", b"caf\xe9"), ("--encoding", "cp1252")),
        ("cp1252.csv", b"prompt,completion\ncaf\xe9,ok\n", ("--encoding", "cp1252")),
    ],
)
def test_fix_writes_a_copy_in_which_every_row_is_valid(tmp_path, name, content, options):
    path = tmp_path / name
    path.write_bytes(content)
    out = tmp_path / ("fixed" + (".csv" if name.endswith("csv") else ".jsonl"))
    result = validate(path, "--fix", "--out", out, *options)
    assert result.exit_code == 0, result.output
    assert path.read_bytes() == content
    fixed = out.read_text(encoding="utf-8")
    if "cp1252" in name:
        assert "café" in fixed
    else:
        assert json.loads(fixed)["messages"] == TURNS
    assert validate(path, "--fix", "--out", out).exit_code == 2


def test_what_no_repair_helps_is_kept_and_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(ROW + b'\n{"messages": [broken\n')
    result = validate(path, "--fix")
    assert result.exit_code == 1
    assert "rows.fixed.jsonl:2: invalid_json" in result.stdout
    assert (tmp_path / "rows.fixed.jsonl").read_bytes() == path.read_bytes()
