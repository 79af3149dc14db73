"""The ten lines of docs/service.md, exactly as printed there."""

import re
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from fixtures.driving import driving

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
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_BASE_URL", f"{service.url}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", service.secret())
    wait = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: wait(seconds / 20))
    with ExitStack() as opened, driving(service.stores, FakeSteps()):
        # The lines leave their file and their client to the end of a process.
        names = {"open": lambda name, mode: opened.enter_context(Path(name).open(mode))}
        exec(compile(code, page, "exec"), names)
        names["client"].close()
    assert capsys.readouterr().out == "Hello!\n"
