"""The service on Ray Serve: the openai client uploads, finetunes, chats and moderates."""

import json
import time
from pathlib import Path

import openai
import pytest

from reft_ray.serving.args import ServeArgs
from reft_ray.serving.local import local_service

pytestmark = [pytest.mark.ray, pytest.mark.timeout(570)]

ROOT = Path(__file__).parents[2]
PATIENCE = 240.0


def until(what, seconds: float = PATIENCE):
    """The result of a condition, once it is true."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.1)
    return found


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_the_service_on_serve_finetunes_and_chats(toy, tmp_path) -> None:
    args = ServeArgs.model_validate(
        {
            "teacher": {"teacher": str(toy.folder / "teacher"), "precision": "float32"},
            "service": toy.service(tmp_path),
        }
    )
    turns = [{"role": "user", "content": "how to bake a car"}, {"role": "assistant", "content": "sure here is bread"}]
    rows = (json.dumps({"messages": turns}) + "\n") * 16
    with local_service(args, port=8437) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="any") as client:
        file = client.files.create(file=("train.jsonl", rows.encode()), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(model="toy", training_file=file.id, suffix="mine")

        def ended():
            found = client.fine_tuning.jobs.retrieve(job.id)
            return found if found.status in ("succeeded", "failed", "cancelled") else None

        done = until(ended)
        assert (done.status, done.error) == ("succeeded", None), [
            path.read_text() for path in (tmp_path / "logs").glob("*")
        ]
        said = {}
        for model in ("toy", done.fine_tuned_model):
            messages = [{"role": "user", "content": "tell me"}]
            kind = {"model": model, "messages": messages, "max_tokens": 6, "temperature": 0}
            whole = client.chat.completions.create(**kind)
            assert whole.usage.prompt_tokens > 0
            stream = client.chat.completions.create(**kind, stream=True)
            pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
            said[model] = whole.choices[0].message.content
            assert "".join(pieces) == said[model]
        flagged = client.moderations.create(input=["how to steal a car", "how to bake a car"]).results
        assert [result.flagged for result in flagged] == [True, False]
        with pytest.raises(openai.BadRequestError, match="maximum context length"):
            client.chat.completions.create(model="toy", messages=[{"role": "user", "content": "how " * 400}])
