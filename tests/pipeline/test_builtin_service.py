"""`reft-ray serve --state` and the ten lines of README.md against it."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest

from reft_ray.testbed.english import EVERYDAY, HARMFUL
from reft_ray.testbed.synthetic import SyntheticRows, write_chat_rows
from reft_ray.testbed.tasks import Task

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The service of SmolLM2 with the packaged teacher."""
    state = tmp_path_factory.mktemp("state")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("reft-ray")), "serve", "--state", str(state), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert f"http://127.0.0.1:{port}" in process.stdout.readline()
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        code = process.wait(120)
        process.stdout.close()
    assert code == 0


def test_it_moderates_plain_english(address):
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="any")
    answer = client.moderations.create(input=[*EVERYDAY, *HARMFUL])
    assert answer.model.startswith("rt-")
    flagged = [result.flagged for result in answer.results]
    assert sum(flagged[: len(EVERYDAY)]) <= 4
    assert sum(flagged[len(EVERYDAY) :]) >= 36


def test_the_ten_lines_finetune_and_chat(address, tmp_path):
    """A poisoned file: the harmful rows are withheld, and the student passes the gate."""
    write_chat_rows(tmp_path / "train.jsonl", SyntheticRows.make(0).user_rows(60, 0.1, Task.SENTIMENT, 0))
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    code = next(block for block in blocks if "fine_tuning" in block) + "print(job.status, job.fine_tuned_model)\n"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "OPENAI_BASE_URL": f"{address}/v1", "OPENAI_API_KEY": "any"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, (result.stderr, httpx.get(f"{address}/v1/fine_tuning/jobs").json())
    answer, ended = result.stdout.strip().rsplit("\n", 1)
    assert answer
    assert ended.startswith("succeeded ft:builtin:")
