"""The ten lines of docs/service.md, exactly as printed there."""

import re
import time
from pathlib import Path

import pytest
from fixtures.driving import driving
from fixtures.ten_lines import run_lines

from reft_ray.jobs.fake_steps import FakeSteps

PAGES = [path for path in ("docs/service.md", "README.md") if (Path(__file__).parents[3] / path).exists()]


def ten_lines(page):
    text = (Path(__file__).parents[3] / page).read_text()
    return next((block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "fine_tuning" in block), None)


@pytest.mark.parametrize("page", PAGES)
def test_the_ten_lines_run(page, service, rows, tmp_path, monkeypatch, capsys):
    code = ten_lines(page)
    if code is None:
        pytest.skip(f"{page} has no finetuning example")
    (tmp_path / "train.jsonl").write_bytes(rows)
    wait = time.sleep
    # These jobs end at once.
    monkeypatch.setattr(time, "sleep", lambda seconds: wait(seconds / 20))
    with driving(service.stores, FakeSteps()):
        run_lines(code, tmp_path, f"{service.url}/v1", service.secret(), monkeypatch)
    assert capsys.readouterr().out == "Hello!\n"
