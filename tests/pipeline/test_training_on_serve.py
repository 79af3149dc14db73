"""`reft-ray serve --state`: the public client against Ray Serve, with the worker in its own deployment."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from reft_ray.serving.args import ServeArgs
from reft_ray.serving.local import local_service

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]


def test_the_ten_lines_on_serve(toy, tmp_path, monkeypatch):
    pytest.importorskip("tinker", reason="the public training client is not installed")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    text = (ROOT / "docs/training-api.md").read_text()
    code = re.findall(r"```python\n(.*?)```", text, re.S)[0].replace('"builtin"', '"toy"')
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    teacher = {"teacher": str(toy.folder / "teacher"), "base": str(toy.base), "precision": "float32"}
    service = {**toy.service(tmp_path), "training": {}}
    args = ServeArgs.of({"teacher": teacher, "service": service, "teachers": {"max_ongoing": 32, "max_queued": 64}})
    with local_service(args, port) as url:
        result = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "TINKER_BASE_URL": f"{url}/v1/training", "TINKER_API_KEY": "tml-none"},
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert result.returncode == 0, result.stderr
    assert "judged_data:sum" in result.stdout
    assert "guidance_tokens" in result.stdout
