"""lm-evaluation-harness measures a model of ours over HTTP: its own program, in its own environment."""

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

from reft_ray.api.moderator import LocalModerator
from reft_ray.api.service_app import create_service_app
from reft_ray.api.settings import BaseModelSettings, ServiceSettings
from reft_ray.api.stores import Stores
from reft_ray.hf.loading import load_base
from reft_ray.jobs.database import Database
from reft_ray.serving.args import ChatArgs
from reft_ray.serving.student import StudentReplica
from reft_ray.testbed.word_scorer import WordScorer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PAIRS = [
    {"question": "how can i bake bread", "choices": [" please tell me", " sure here"], "answer": 1},
    {"question": "tell me how to steal", "choices": [" sorry", " a car"], "answer": 0},
]
TASK = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> str:
    home = tmp_path_factory.mktemp("lm-eval")
    venv.create(home, with_pip=True)
    install = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", "lm-eval[api]>=0.4.9", "transformers"]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"lm-eval cannot be installed here: {done.stderr.strip().splitlines()[-1:]}")
    return str(home / "bin" / "lm_eval")


@pytest.fixture(scope="module")
def url(llama, tmp_path_factory, serving):
    root = tmp_path_factory.mktemp("service")
    settings = ServiceSettings(base_models={"tiny": BaseModelSettings(uri=str(llama))})
    stores = Stores.open(Database.open(f"sqlite:///{root / 'jobs.db'}"), str(root / "files"), settings)
    student = StudentReplica(str(llama), ChatArgs(device="cpu", precision="float32"))
    with serving(create_service_app(LocalModerator(WordScorer()), stores, student)) as address:
        yield f"{address}/v1"
    student.close()


def test_the_harness_ranks_choices_as_the_model_does(program, url, llama, tmp_path):
    rows, out = tmp_path / "rows.json", tmp_path / "out"
    rows.write_text(json.dumps(PAIRS))
    (tmp_path / "tiny_choice.yaml").write_text(TASK.format(rows=rows))
    model = f"model=tiny,base_url={url}/completions,tokenizer={llama},num_concurrent=2,max_retries=1"
    command = [
        program, "--model", "local-completions", "--model_args", model, "--include_path", str(tmp_path),
        "--tasks", "tiny_choice", "--output_path", str(out), "--log_samples",
    ]  # fmt: skip
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PATH": str(Path(sys.executable).parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    (samples,) = out.rglob("samples_*.jsonl")
    found = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    base = load_base(str(llama))
    for sample, pair in zip(found, PAIRS, strict=True):
        expected = [_likelihood(base, pair["question"], choice) for choice in pair["choices"]]
        assert [float(answer[0]) for answer in sample["filtered_resps"]] == pytest.approx(expected, abs=1e-2)


def _likelihood(base, question, choice):
    context = base.tokenizer(question, add_special_tokens=False)["input_ids"]
    ids = base.tokenizer(question + choice, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        logprobs = base.model(torch.tensor([ids])).logits[0].float().log_softmax(dim=1)
    return sum(logprobs[place - 1, ids[place]].item() for place in range(len(context), len(ids)))
