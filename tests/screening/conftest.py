"""Rows with known outcomes under the word scorer."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

WORDS = "amber brisk cedar delta ember fable grove haven ivory jolly karma lemon maple noble ocean pearl quiet river"


def row(index: int, word: str = "") -> dict:
    """A distinct chat row; `word` decides its outcome: `knife` review, `bomb` blocked, others kept."""
    names = WORDS.split()
    text = " ".join(names[(index * step + step) % len(names)] for step in range(1, 12))
    prompt = f"Question {index} about {text} {word}".strip()
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": f"Answer {index}."}]}


def mixed(count: int) -> list[bytes]:
    """Lines: every 10th blocked, every 15th for review, every 21st invalid, the others kept."""
    lines = []
    for index in range(1, count + 1):
        if index % 21 == 0:
            lines.append(b'{"messages": "none"}' if index % 2 else b"{broken")
        else:
            word = "bomb" if index % 10 == 0 else "knife" if index % 15 == 0 else ""
            lines.append(json.dumps(row(index, word)).encode())
    return lines


@pytest.fixture
def columnar_file(tmp_path: Path):
    """`rows.KIND` of a table, a Parquet or an Arrow file."""

    def write(kind: str, table: pa.Table, **parquet) -> Path:
        path = tmp_path / f"rows.{kind}"
        if kind == "parquet":
            pq.write_table(table, path, **parquet)
        else:
            with pa.ipc.new_file(str(path), table.schema) as writer:
                writer.write_table(table)
        return path

    return write


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """210 mixed rows as JSONL."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(mixed(210)) + b"\n")
    return path
