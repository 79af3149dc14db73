"""Reading: exact bytes and row numbers from every container, for any cuts and any order."""

import csv
import gzip
import io
import json
import random
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from reft_ray.core.errors import UsageError
from reft_ray.rows.format import Format
from reft_ray.screening import columnar
from reft_ray.screening.columnar import row_sizes
from reft_ray.screening.file_parsing import parse_unit, shape_of
from reft_ray.screening.ranges import Limits
from reft_ray.screening.reading import ROWS, groups, plan_files, read_units
from reft_ray.screening.sources import Container, display_name, find_sources

LIMITS = [Limits(), Limits(7, 300, 4000), Limits(1, 1, 4000)]


def rows_of(path, limits=LIMITS[0], container=None, done=frozenset()):
    rows = []
    for plan in plan_files(find_sources([str(path)], container), limits):
        for ranges in groups(plan, done):
            for unit in read_units(plan, ranges):
                assert unit.rows.schema.equals(ROWS)
                assert unit.rows.num_rows <= limits.rows
                rows += zip(*(unit.rows[name].to_pylist() for name in ROWS.names), strict=True)
    return rows


def sample_lines(count=500):
    rng = random.Random(0)
    rows = (
        json.dumps({"id": "0012", "when": "2024-01-02", "n": 10**22, "t": "é" * rng.randrange(80)})
        for _ in range(count)
    )
    return [row if rng.random() > 0.1 else " " for row in rows]


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("pack", ["plain", "gzip", "zstd"])
def test_jsonl_rows_keep_their_bytes_and_line_numbers(tmp_path, limits, ending, pack):
    lines = sample_lines()
    raw = ending.join(lines).encode()
    path = tmp_path / "rows.jsonl"
    path.write_bytes({"plain": bytes, "gzip": gzip.compress, "zstd": zstandard.compress}[pack](raw))
    physical = raw.split(b"\n")
    expected = [(number, line, None) for number, line in enumerate(physical, 1) if line.strip()]
    assert rows_of(path, limits) == expected


@pytest.mark.parametrize("span_bytes", [16, 100, 5000])
@pytest.mark.parametrize("ends", [b"", b"\n", b"\n\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_pieces_of_a_file_give_its_rows_and_line_numbers(tmp_path, span_bytes, ends, mark):
    lines = [line.encode() for line in sample_lines(200)]
    lines[50] = b'{"a":"%s"}' % (b"x" * 9000)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(mark + b"\n".join(lines) + ends)
    sources, limits = find_sources([str(path)]), Limits(7, 300, 4000)
    # In any order, as workers may do it.
    backwards = lambda work, items: [work(item) for item in reversed(items)][::-1]  # noqa: E731
    (plan,) = plan_files(sources, limits, backwards, span_bytes)
    units = [unit for ranges in groups(plan) for unit in read_units(plan, ranges)]
    found = [row for unit in units for row in zip(*(unit.rows[n].to_pylist() for n in ROWS.names), strict=True)]
    expected = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    assert [(number, raw) for number, raw, _ in found if number != 51] == [row for row in expected if row[0] != 51]
    assert [(number, reason.split(":")[0]) for number, _, reason in found if reason] == [(51, "row_too_large")]
    assert [unit.id for unit in units] == [plan.unit_id(unit) for unit in plan.cuts.ranges]
    assert plan.cuts.rows == len((b"\n".join(lines) + ends).removesuffix(b"\n").split(b"\n"))
    assert plan.cuts.warnings == plan_files(sources, limits)[0].cuts.warnings


def test_row_groups_are_cut_as_the_whole_file(tmp_path):
    table = pa.table({"prompt": ["p" * (index % 40) for index in range(500)], "response": ["r"] * 500})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=60)
    sources = find_sources([str(tmp_path / "rows.parquet")])
    (whole,) = plan_files(sources, LIMITS[1])
    for span_bytes in (1, 3000):
        assert plan_files(sources, LIMITS[1], span_bytes=span_bytes) == [whole]


def test_units_are_the_same_after_a_restart_that_skips_some(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(sample_lines()).encode()))
    (plan,) = plan_files(find_sources([str(path)]), LIMITS[1])
    whole = {unit.id: unit for ranges in groups(plan) for unit in read_units(plan, ranges)}
    done = frozenset(list(whole)[::3])
    rest = [unit for ranges in groups(plan, done) for unit in read_units(plan, ranges)]
    assert [unit.id for unit in rest] == [name for name in whole if name not in done]
    assert all(unit.rows.equals(whole[unit.id].rows) for unit in rest)


def test_a_row_over_the_limit_is_named_and_affects_no_other(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a":1}\n{"a":"%s"}\n{"a":3}\n' % (b"x" * 5000))
    rows = rows_of(path, Limits(10, 1000, 2000))
    assert [(number, reason and reason.split(":")[0]) for number, _, reason in rows] == [
        (1, None),
        (2, "row_too_large"),
        (3, None),
    ]
    assert len(rows[1][1]) <= 1024


def test_row_numbers_continue_over_files_in_order(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text('{"x":1}\n\n{"x":2}\n')
    assert [number for number, _, _ in rows_of(tmp_path / "*.jsonl")] == [1, 3, 4, 6]
    assert rows_of(tmp_path) == rows_of(tmp_path / "*.jsonl")


def test_byte_order_mark_is_dropped_with_a_warning(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"x":1}\r\n')
    (plan,) = plan_files(find_sources([str(path)]), LIMITS[0])
    assert len(plan.cuts.warnings) == 2
    assert rows_of(path) == [(1, b'{"x":1}\r', None)]


@pytest.mark.parametrize("limits", LIMITS)
def test_csv_records_keep_their_bytes_and_first_line(tmp_path, limits):
    out = io.StringIO()
    writer = csv.writer(out)
    records = [[f'a\n"{index}"' if index % 3 else "007", "x,y"] for index in range(200)]
    writer.writerows([["prompt", "response"], *records])
    path = tmp_path / "rows.csv"
    path.write_bytes(out.getvalue().encode())
    rows = rows_of(path, limits)
    assert [next(csv.reader(io.StringIO(raw.decode(), newline=""))) for _, raw, _ in rows] == records
    physical = out.getvalue().encode().split(b"\n")
    assert all(raw.split(b"\n")[0] == physical[number - 1] for number, raw, _ in rows)


@pytest.mark.parametrize("limits", LIMITS)
def test_json_arrays_keep_the_text_of_their_elements(tmp_path, limits):
    rows = [{"i": index, "t": "é" * (index % 50)} for index in range(300)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
    read = rows_of(path, limits)
    assert [json.loads(raw) for _, raw, _ in read] == rows
    assert [number for number, _, _ in read] == list(range(1, 301))
    assert read[0][1] == b'{\n    "i": 0,\n    "t": ""\n  }'


@pytest.mark.parametrize("text", ["[", '[{"a":1}', '[{"a":1} {"a":2}]', '[{"a":1}] x', "[1]", '[{"a":}]'])
def test_broken_json_arrays_are_refused_with_the_place(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"rows\.json.*near element"):
        rows_of(path)


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("kind", ["parquet", "file.arrow", "stream.arrow"])
def test_columnar_rows_keep_their_columns(tmp_path, limits, kind):
    table = pa.table({"prompt": [f"p{index}" for index in range(500)], "response": ["r"] * 500})
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=130)
    else:
        opener = pa.ipc.new_file if kind == "file.arrow" else pa.ipc.new_stream
        with opener(str(path), table.schema) as writer:
            for batch in table.to_batches(77):
                writer.write_batch(batch)
    (plan,) = plan_files(find_sources([str(path)]), limits)
    units = [unit for ranges in groups(plan) for unit in read_units(plan, ranges)]
    assert pa.concat_tables([unit.native for unit in units]).combine_chunks().equals(table)
    assert [n for unit in units for n in unit.rows["row_number"].to_pylist()] == list(range(1, 501))
    skipped = frozenset(unit.id for unit in units[1::2])
    again = [unit for ranges in groups(plan, skipped) for unit in read_units(plan, ranges)]
    assert [unit.id for unit in again] == [unit.id for unit in units[::2]]
    assert all(one.native.equals(other.native) for one, other in zip(again, units[::2], strict=True))


def test_json_lines_under_a_json_name_are_detected_by_their_first_byte(tmp_path):
    (tmp_path / "a.json").write_text('{"x":1}\n{"x":2}\n')
    (tmp_path / "b.json").write_text('[{"x":1}]')
    assert [source.container for source in find_sources([str(tmp_path)])] == [Container.JSONL, Container.JSON]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.bin", b"\x00\x01", "--container"),
        ("rows.jsonl", "{}".encode("utf-16"), "UTF-16"),
        ("rows.jsonl.gz", gzip.compress(b"{}\n" * 5000, mtime=0)[:-20], "rows.jsonl.gz"),
        ("rows.parquet", b"PAR1 damaged", "damaged"),
    ],
)
def test_unreadable_files_are_refused_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message) as refused:
        rows_of(tmp_path / name)
    assert "\n" not in str(refused.value)


def test_missing_files_are_an_error(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        find_sources([str(tmp_path / "nothing.jsonl")])
    with pytest.raises(UsageError, match="no input"):
        find_sources([])


def test_credentials_are_never_shown():
    assert display_name("s3://key:secret@bucket/a.jsonl?endpoint_override=h") == "s3://bucket/a.jsonl"


@pytest.fixture
def stored(columnar_file):
    """A file whose texts are dictionaries (plain types in Parquet), and its plan."""

    def store(kind, columns):
        path = columnar_file(kind, pa.table(columns), store_schema=False, compression="zstd")
        (plan,) = plan_files(find_sources([str(path)]), Limits(2000, 1 << 20, 4 << 20))
        return path, plan

    return store


def repeated(count, text):
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), [text])


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_text_that_is_stored_once_and_used_in_every_row_makes_small_units(stored, kind):
    path, plan = stored(kind, {"prompt": repeated(300, "x" * 100_000), "response": repeated(300, "r")})
    assert path.stat().st_size < 200_000
    units = [parse_unit(unit, plan.source.container) for ranges in groups(plan) for unit in read_units(plan, ranges)]
    assert [len(rows) for rows in units] == [10] * 30
    assert all(row == {"prompt": "x" * 100_000, "response": "r"} for rows in units for row in rows)


def test_large_row_groups_are_cut_by_the_same_bytes(stored, monkeypatch):
    columns = {"prompt": repeated(300, "x" * 100_000), "turns": [["a", None], [], None] * 100}
    _, plan = stored("parquet", columns)
    units = [unit for ranges in groups(plan) for unit in read_units(plan, ranges)]
    monkeypatch.setattr(columnar, "_COMPACT_BYTES", 0)
    monkeypatch.setattr(columnar, "_COMPACT_FILE", 0)
    _, again = stored("parquet", columns)
    assert again.cuts == plan.cuts
    plain = [unit for ranges in groups(again) for unit in read_units(again, ranges)]
    assert all(one.native.equals(other.native) for one, other in zip(units, plain, strict=True))


def test_a_plan_reads_a_files_footer_as_often_for_many_row_groups(tmp_path, monkeypatch):
    footers = []

    def counted(*args, **options):
        footers[-1] += "metadata" not in options
        return pq.ParquetFile(*args, **options)

    monkeypatch.setattr(columnar, "pq", SimpleNamespace(ParquetFile=counted))
    for rows in (2, 20):
        path = tmp_path / f"{rows}.parquet"
        pq.write_table(pa.table({"prompt": ["p"] * 40, "response": ["r"] * 40}), path, row_group_size=rows)
        footers.append(0)
        assert plan_files(find_sources([str(path)]), LIMITS[0])[0].cuts.rows == 40
    assert footers[0] == footers[1] > 0


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_row_of_columns_over_the_limit_is_named_and_never_converted(stored, kind):
    # The middle row would take 100 GB in memory; its file is tiny.
    turns = pa.ListArray.from_arrays([0, 1, 1_000_001, 1_000_002], repeated(1_000_002, "x" * 100_000))
    _, plan = stored(kind, {"prompt": ["a", "b", "c"], "turns": turns})
    before = pa.total_allocated_bytes()
    units = [unit for ranges in groups(plan) for unit in read_units(plan, ranges)]
    assert pa.total_allocated_bytes() - before < 64 << 20
    assert [unit.rows["row_number"].to_pylist() for unit in units] == [[1], [2], [3]]
    one, fault, three = (row for unit in units for row in parse_unit(unit, plan.source.container))
    assert (one["prompt"], fault.code, three["prompt"]) == ("a", "row_too_large", "c")


def test_sizes_of_rows_are_those_of_their_values():
    rows = [
        {"t": "four", "l": ["a", "bcd"], "m": [("k", "val")], "s": {"x": "yy", "n": 1}, "f": ["p", "q"]},
        {"t": None, "l": [], "m": None, "s": {"x": None, "n": None}, "f": [None, "long"]},
        {"t": "x" * 50, "l": None, "m": [], "s": None, "f": ["", ""]},
    ]
    turns, words = pa.map_(pa.string(), pa.string()), pa.dictionary(pa.int8(), pa.string())
    types = {"t": words, "l": pa.list_(pa.large_string()), "m": turns, "f": pa.list_(pa.string(), 2)}
    types["s"] = pa.struct([("x", pa.binary()), ("n", pa.int16())])
    (batch,) = pa.Table.from_pylist(rows, pa.schema(types.items())).to_batches()
    texts = [4 + 4 + 4 + 2 + 2, 4, 50]
    # 8 bytes for each cell and each value in it; nulls count too, except in dictionaries and lists.
    cells = [1 + 3 + 4 + 3 + 3, 1 + 1 + 1 + 3 + 3, 1 + 1 + 1 + 3 + 3]
    expected = [text + 8 * count for text, count in zip(texts, cells, strict=True)]
    assert row_sizes(batch).tolist() == expected
    assert row_sizes(batch.slice(1)).tolist() == expected[1:]


@pytest.mark.parametrize("kind", [pa.string_view(), pa.list_view(pa.string()), pa.json_()])
def test_types_of_unknown_size_are_refused(columnar_file, kind):
    table = pa.table({"prompt": pa.nulls(1, kind), "response": ["r"]})
    path = columnar_file("arrow", table)
    with pytest.raises(UsageError, match=r"rows\.arrow: column prompt is of the type .*; cast or drop it"):
        rows_of(path)


def string_array(*texts):
    """Strings as a hostile writer stores them, without a check of their bytes."""
    ends = np.cumsum([0, *map(len, texts)], dtype=np.int32)
    return pa.Array.from_buffers(pa.string(), len(texts), [None, pa.py_buffer(ends), pa.py_buffer(b"".join(texts))])


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_values_that_python_cannot_represent_affect_only_their_row(columnar_file, kind):
    late = pa.StructArray.from_arrays([pa.array([0, 2**62, 0, 0], pa.timestamp("ms"))], names=["at"])
    table = pa.table(
        {
            "prompt": string_array(b"one", b"two", b"\xff\xfe", b"four"),
            "response": ["r"] * 4,
            "late": late,
            "when": pa.array([2**62] * 4, pa.timestamp("ms")),
            "zone": pa.array([0] * 4, pa.timestamp("ms", "Nowhere/Else")),
            "day": pa.array([2**30] * 4, pa.date32()),
            "lasts": pa.array([2**62] * 4, pa.duration("s")),
            "tags": pa.array([[("a", "b")], [], None, []], pa.map_(pa.string(), pa.string())),
        }
    )
    path = columnar_file(kind, table)
    (plan,) = plan_files(find_sources([str(path)]), LIMITS[0])
    shape = shape_of(plan, None, {})
    (unit,) = read_units(plan, plan.cuts.ranges)
    one, two, three, four = parse_unit(unit, shape.container)
    assert shape.format is Format.RESPONSE
    assert (one["prompt"], one["tags"], four["prompt"]) == ("one", [["a", "b"]], "four")
    assert "when" not in one
    assert [(fault.path, fault.code) for fault in (two, three)] == [("late", "data_type"), ("prompt", "invalid_utf8")]
