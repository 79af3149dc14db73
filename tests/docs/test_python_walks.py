"""The four walks of docs/python.md run as printed, one after another."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs/python.md"


def test_the_walks_run(walk_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(walk_folder)
    walks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    names: dict[str, object] = {}
    printed = []
    for number, walk in enumerate(walks, start=1):
        exec(compile(walk, f"walk {number}", "exec"), names)
        printed.append(capsys.readouterr().out)
    scores, screened, finetuned, evaluated, served = printed
    assert len(scores.splitlines()) == 2
    assert re.match(r"12 rows: \d+ kept, \d+ for review, \d+ blocked", screened)
    assert finetuned == ""
    assert (walk_folder / "student/adapter_model.safetensors").is_file()
    assert evaluated.startswith("HS {'value': ")
    decision, metrics = served.splitlines()
    assert decision in ("allow", "review", "block")
    assert f'decision="{decision}"' in metrics
