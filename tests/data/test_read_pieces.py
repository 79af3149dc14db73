"""Reading in pieces, without a cluster: every row once, with its bytes and its line, for any cut."""

import gzip
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reft_ray.core.errors import UsageError
from reft_ray.data import Moderate
from reft_ray.data.read import ROWS, RowsDatasource, blocks
from reft_ray.rows.format import Format
from reft_ray.rows.reader import RowReader
from reft_ray.screening.pieces import pieces_of
from reft_ray.screening.sources import find_sources
from reft_ray.testbed.word_scorer import WordScorer


def chat_line(index: int, words: str = "") -> bytes:
    asked = f"Question {index} {words}".strip()
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": "é" * (index % 40 + 1)}]
    return json.dumps({"messages": turns}, ensure_ascii=False).encode()


def read(path, span_bytes, reader=None):
    (source,) = find_sources([str(path)])
    pieces = pieces_of(source, span_bytes)
    tables = [table for piece in pieces for table in blocks(piece, reader or RowReader())]
    assert all(table.schema.equals(ROWS) for table in tables)
    return [row for table in tables for row in table.to_pylist()]


@pytest.mark.parametrize("span_bytes", [1, 17, 100, 4096, 1 << 30])
@pytest.mark.parametrize("ends", [b"\n", b""])
def test_every_row_is_read_once_for_any_cut(tmp_path, span_bytes, ends):
    rng = random.Random(span_bytes)
    lines = [chat_line(index) if rng.random() < 0.8 else rng.choice([b"", b"  ", b"{broken"]) for index in range(60)]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines) + ends)
    reader = RowReader(Format.CHAT)
    rows = read(path, span_bytes, reader)
    assert [row["raw"] for row in rows] == [line for line in lines if line.strip()]
    raw = path.read_bytes()
    assert all(raw[row["position"] :].startswith(row["raw"]) for row in rows)
    assert [row["faults"] is None for row in rows] == [row["raw"] != b"{broken" for row in rows]


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.csv", "rows.json", "rows.parquet"])
def test_files_without_places_to_cut_are_one_piece(tmp_path, name):
    path = tmp_path / name
    pairs = [{"prompt": f"Q{index}", "completion": f"A{index}"} for index in range(5)]
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(pairs), path)
    elif name.endswith(".csv"):
        path.write_text("prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in pairs))
    else:
        lines = b"\n".join(json.dumps(row).encode() for row in pairs)
        path.write_bytes(gzip.compress(lines) if name.endswith(".gz") else json.dumps(pairs).encode())
    (source,) = find_sources([str(path)])
    assert len(pieces_of(source, 8)) == 1
    asked = [json.loads(row["messages"])[0]["content"] for row in read(path, 8)]
    assert asked == [row["prompt"] for row in pairs]


def test_row_groups_are_read_apart_and_keep_their_numbers(tmp_path):
    pairs = [{"prompt": f"Q{index}", "completion": f"A{index}"} for index in range(50)]
    pq.write_table(pa.Table.from_pylist(pairs), tmp_path / "rows.parquet", row_group_size=7)
    (source,) = find_sources([str(tmp_path / "rows.parquet")])
    assert len(pieces_of(source, 1)) == 8
    for span_bytes in (1, 400, 1 << 30):
        rows = read(tmp_path / "rows.parquet", span_bytes)
        assert [row["position"] for row in rows] == list(range(1, 51))
        assert [json.loads(row["messages"])[0]["content"] for row in rows] == [row["prompt"] for row in pairs]


def test_small_files_share_tasks_and_large_ones_are_cut(tmp_path):
    for index in range(50):
        (tmp_path / f"{index:02d}.jsonl").write_bytes(chat_line(index))
    pieces = [piece for source in find_sources([str(tmp_path)]) for piece in pieces_of(source)]
    tasks = RowsDatasource(pieces, RowReader()).get_read_tasks(8)
    assert 4 <= len(tasks) <= 8
    assert sum(table.num_rows for task in tasks for table in task()) == 50


def test_moderate_judges_every_column_that_holds_text():
    turns = [{"role": "user", "content": "how to build a bomb"}]
    for column in (["how to build a bomb", "hello", None], [turns, [turns[0] | {"content": "hello"}], None]):
        table = Moderate(factory=WordScorer, column="text")(pa.table({"text": column}))
        assert table["decision"].to_pylist() == ["block", "allow", "invalid"]
    with pytest.raises(UsageError, match="name one of"):
        Moderate()
