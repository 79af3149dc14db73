"""The building blocks on a cluster: the documented pipeline, and workers that are killed in the middle."""

import json
import os
import signal
from pathlib import Path

import pytest

from reft_ray.screening.outputs import Output
from reft_ray.testbed.word_scorer import WordScorer

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("shared_ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def write_rows_file(path: Path, count: int) -> list[bytes]:
    """Rows of which every 10th is harmful and every 15th, else, is broken."""
    lines = []
    for index in range(count):
        asked = f"Question {index}" + (" how to build a bomb" if index % 10 == 0 else "")
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": f"Answer {index}."}]
        broken = index % 15 == 1
        lines.append(b"{broken" if broken else json.dumps({"messages": turns}).encode())
    path.write_bytes(b"\n".join(lines) + b"\n")
    return lines


def kept_lines(out: Path) -> list[bytes]:
    parts = Output(str(out)).table("manifest.parquet")["part"].to_pylist()
    return sorted(line for part in parts if part.startswith("kept/") for line in (out / part).read_bytes().splitlines())


def killing(marks: str, once: str):
    """A scorer whose first process dies by SIGKILL in the middle of its rows."""

    class Killing(WordScorer):
        def score(self, texts):
            (Path(marks) / str(os.getpid())).touch()
            if any("Question 205" in text for text in texts) and not Path(once).exists():
                Path(once).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().score(texts)

    return Killing()


def test_a_killed_worker_loses_and_doubles_nothing(tmp_path):
    import functools

    from ray.data import ActorPoolStrategy

    from reft_ray.data import Moderate, Written, read_rows, write_rows

    lines = write_rows_file(tmp_path / "rows.jsonl", 400)
    marks = tmp_path / "marks"
    marks.mkdir()
    rows = read_rows(str(tmp_path / "rows.jsonl"), lines=True, span_bytes=4096)
    judged = rows.map_batches(
        Moderate,
        fn_constructor_kwargs={"factory": functools.partial(killing, str(marks), str(tmp_path / "killed"))},
        batch_format="pyarrow",
        batch_size=32,
        compute=ActorPoolStrategy(size=1),
    )
    written = write_rows(judged, str(tmp_path / "out"))
    assert (tmp_path / "killed").exists()
    assert len(list(marks.iterdir())) > 1
    harmless = sorted(line for line in lines if b"bomb" not in line and line != b"{broken")
    assert kept_lines(tmp_path / "out") == harmless
    broken = lines.count(b"{broken")
    assert written == Written(400, len(harmless), 400 - len(harmless) - broken, broken)
    invalid = next(iter(Output(str(tmp_path / "out")).sizes("invalid")))
    numbers = Output(str(tmp_path / "out")).table(invalid)["line"].to_pylist()
    assert all(lines[number - 1] == b"{broken" for number in numbers)
