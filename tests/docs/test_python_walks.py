"""The walks of docs/python.md run as printed, one after another; the one on Ray Data in the lane `ray`."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs/python.md"


def walks_of(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_walk_on_ray_data_runs(
    walk_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(walk_folder)
    (walk,) = [walk for walk in walks_of(PAGE) if "read_rows" in walk]
    assert len([line for line in walk.splitlines() if line.strip()]) <= 12
    exec(compile(walk, "walk", "exec"), {"Path": Path})
    assert capsys.readouterr().out.strip().endswith(", invalid=0)")
    assert (walk_folder / "moderated/manifest.parquet").is_file()


def test_the_walks_run(walk_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(walk_folder)
    walks = [walk for walk in walks_of(PAGE) if "ray.data" not in walk]
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
