"""Watching a directory: files as they appear, each once, also after kill -9."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from reft_ray.screening.config import ScreenConfig
from reft_ray.screening.ranges import Limits
from reft_ray.screening.report import load_report
from reft_ray.screening.watching import watch
from reft_ray.testbed.word_scorer import WordScorer

CONFIG = ScreenConfig(limits=Limits(rows=8), findings=False, job_threshold=False)


def rows_file(folder: Path, name: str, count: int) -> Path:
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    path = folder / name
    path.write_bytes(b"".join(json.dumps({"messages": turns, "n": n}).encode() + b"\n" for n in range(count)))
    return path


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def test_files_are_screened_as_they_appear_and_once(folder, tmp_path):
    seen, loaded = [], []

    def scorer():
        loaded.append(1)
        return WordScorer()

    def next_file(found):
        seen.append(found)
        if len(seen) == 1:
            rows_file(folder, "b.jsonl", 3)
            (folder / "c.jsonl").write_text("<!doctype html>")

    rows_file(folder, "a.jsonl", 20)
    looks = itertools.count()
    stop = lambda: len(seen) == 3 or next(looks) > 60  # noqa: E731
    watch([str(folder)], str(tmp_path / "out"), scorer, CONFIG, next_file, every=0, stop=stop)
    assert [Path(found.name).name for found in seen] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert "an HTML page" in seen[2].refused
    assert [load_report(found.out).rows for found in seen[:2]] == [20, 3]
    assert len(loaded) == 1
    again = []
    looks = itertools.count()
    watch([str(folder)], str(tmp_path / "out"), scorer, CONFIG, again.append, every=0, stop=lambda: next(looks) > 8)
    assert again == []


def test_a_store_that_does_not_tell_when_files_were_written_has_each_file_once(folder):
    seen, looks = [], itertools.count()
    rows_file(folder, "a.jsonl", 3)
    out, stop = f"memory://watched-{folder.parent.name}/out", lambda: next(looks) > 12
    watch([str(folder)], out, WordScorer, CONFIG, seen.append, every=0, stop=stop)
    assert [(Path(found.name).name, found.refused) for found in seen] == [("a.jsonl", "")]


SCRIPT = """
import os, signal, sys
from pathlib import Path
from reft_ray.screening.config import ScreenConfig
from reft_ray.screening.ranges import Limits
from reft_ray.screening.watching import watch
from reft_ray.testbed.word_scorer import WordScorer

calls = []
class Dying(WordScorer):
    def score(self, texts):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().score(["" for _ in texts])

config = ScreenConfig(limits=Limits(rows=8), findings=False, job_threshold=False, cache_texts=1)
watch([sys.argv[1]], sys.argv[2], Dying, config, print, every=0)
"""


def test_a_killed_watch_resumes_its_file(folder, tmp_path):
    lines = [json.dumps({"prompt": f"Q{n}", "response": f"A{n}"}) for n in range(40)]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", SCRIPT, str(folder), str(tmp_path / "out")]
    killed = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(list((tmp_path / "out").rglob("units/*.json"))) == 2
    seen = []
    config = ScreenConfig(limits=Limits(rows=8), findings=False, job_threshold=False, cache_texts=1)
    watch([str(folder)], str(tmp_path / "out"), WordScorer, config, seen.append, every=0, stop=lambda: len(seen) == 1)
    assert load_report(seen[0].out).kept == 40
    kept = b"".join(path.read_bytes() for path in sorted((Path(seen[0].out) / "kept").iterdir()))
    assert kept.decode().splitlines() == lines
