"""The service in one process, except for the drivers, with the real teacher, steps, students and client."""

import json
import re
from pathlib import Path

import openai
import pytest
from fixtures.ten_lines import run_lines

from reft_ray.api.moderator import LocalModerator
from reft_ray.hf.ref_teacher import RefTeacher
from reft_ray.serving.args import ChatArgs, ServeArgs
from reft_ray.serving.finetuning_service import finetuning_app
from reft_ray.serving.student import StudentReplica
from reft_ray.telemetry.recorder import MemoryRecorder

ROOT = Path(__file__).parents[2]


def ten_lines() -> str:
    text = (ROOT / "docs/service.md").read_text()
    return next(block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "fine_tuning" in block)


def user_row(text: str) -> dict:
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "sure here is bread"}]
    return {"messages": turns}


@pytest.fixture
def students(llama):
    replica = StudentReplica(str(llama), ChatArgs(device="cpu", precision="float32"))
    yield replica
    replica.close()


@pytest.fixture
def args(toy, tmp_path, monkeypatch) -> ServeArgs:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return ServeArgs.model_validate({"service": toy.service(tmp_path)})


@pytest.fixture
def service(args, toy, llama, students, serving):
    moderator = LocalModerator(RefTeacher.load(toy.folder / "teacher").scorer(precision="float32"))
    app = finetuning_app(args, args.service, moderator, students, MemoryRecorder())
    with serving(app) as url:
        yield f"{url}/v1"


def logs(tmp_path: Path) -> str:
    return "\n".join(path.read_text() for path in sorted((tmp_path / "logs").glob("*.log")))


def test_the_ten_lines_run_against_the_real_service(service, tmp_path, monkeypatch) -> None:
    rows = [user_row(f"how to bake a {thing}") for thing in ("car", "bread", "me", "that") * 4]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = ten_lines().replace('model="builtin"', 'model="toy"')
    names = run_lines(code, tmp_path, service, "any", monkeypatch)
    assert (names["job"].status, names["job"].error) == ("succeeded", None), logs(tmp_path)
    with openai.OpenAI(base_url=service, api_key="any") as client:
        (job,) = client.fine_tuning.jobs.list().data
        events = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=100)]
        assert events.count("Release gate: passed") == 1
        names = {client.files.retrieve(id).filename for id in job.result_files}
        assert names == {"screening_report.jsonl", "step_metrics.csv", "release_gate.json", "adapter.zip"}
        stream = client.chat.completions.create(
            model=job.fine_tuned_model,
            messages=[{"role": "user", "content": "tell me"}],
            max_tokens=5,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        assert chunks[-1].usage.completion_tokens <= 5
        whole = client.chat.completions.create(
            model=job.fine_tuned_model,
            messages=[{"role": "user", "content": "tell me"}],
            max_tokens=5,
            temperature=0,
        )
        assert (
            "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
        )
