"""The ten lines of docs/service.md, exactly as printed there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from reft_ray.jobs.driver import DriverConfig
from reft_ray.jobs.launcher import ProcessLauncher
from reft_ray.jobs.lease import Leases
from reft_ray.jobs.reconciler import Reconciler

PAGES = [path for path in ("docs/service.md", "README.md") if (Path(__file__).parents[3] / path).exists()]


def ten_lines(page):
    text = (Path(__file__).parents[3] / page).read_text()
    return next((block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "fine_tuning" in block), None)


@pytest.mark.parametrize("page", PAGES)
def test_the_ten_lines_run(page, service, rows, tmp_path):
    code = ten_lines(page)
    if code is None:
        pytest.skip(f"{page} has no finetuning example")
    (tmp_path / "train.jsonl").write_bytes(rows)
    stores = service.stores
    config = DriverConfig(
        stores.database.engine.url.render_as_string(hide_password=False),
        stores.files.content.uri("x").removesuffix("/x"),
        "reft_ray.jobs.fake_steps:make",
    )
    reconciler = Reconciler(stores.jobs, Leases(stores.jobs), ProcessLauncher(config, tmp_path / "logs"))
    with reconciler.background(0.05):
        result = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={"OPENAI_BASE_URL": f"{service.url}/v1", "OPENAI_API_KEY": service.secret()},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert (result.returncode, result.stdout) == (0, "Hello!\n"), result.stderr
