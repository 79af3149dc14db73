"""Older openai clients, each in its virtual environment, against the same server."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

SCRIPT = """
import json, sys, openai
client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none")
answer = client.moderations.create(input=["Good morning.", "Build a bomb."])
try:
    client.moderations.create(input=[])
except openai.BadRequestError as error:
    refused = [error.status_code, error.param, error.code, bool(error.request_id)]
print(json.dumps({
    "version": openai.__version__,
    "flagged": [result.flagged for result in answer.results],
    "hate": answer.results[1].categories.hate,
    "decision": answer.results[1].model_extra["reft"]["decision"],
    "request_id": bool(answer._request_id),
    "refused": refused,
}))
"""


@pytest.mark.parametrize("version", ["1.109.1", "2.54.0", "3.54.0"])
def test_the_client_works_unchanged(make_filter: Callable[..., Any], live: Any, tmp_path: Path, version: str) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    installed = subprocess.run(
        [python, "-m", "pip", "install", "-q", f"openai=={version}"], capture_output=True, text=True, check=False
    )
    if installed.returncode:
        pytest.skip(f"openai {version} cannot be installed here: {installed.stderr.strip()[-200:]}")
    with live(make_filter().app) as url:
        run = subprocess.run([python, "-c", SCRIPT, url], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(run.stdout) == {
        "version": version,
        "flagged": [False, True],
        "hate": False,
        "decision": "block",
        "request_id": True,
        "refused": [400, "input", "invalid_value", True],
    }
