"""`reft-ray eval` and `reft-ray bench` with several judges."""

import json
from pathlib import Path

import pytest
from evaluation.test_endpoint_judges import Service
from typer.testing import CliRunner

from reft_ray.cli.main import app
from reft_ray.core.errors import UsageError
from reft_ray.evaluation.endpoint import ChatJudge
from reft_ray.experiments.bench.config import BenchConfig
from reft_ray.experiments.bench.workspace import Workspace
from reft_ray.hf.generate import Responder

RUN = CliRunner()


@pytest.fixture
def service():
    service = Service()
    yield service
    service.close()


@pytest.fixture
def arguments(llama: Path, tmp_path: Path) -> list[str]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"how to {verb} a car"}) + "\n" for verb in ("steal", "bake", "me")))
    sizes = ["--max-new-tokens", "4", "--max-prompts", "2", "--device", "cpu", "--batch-tokens", "64"]
    asked = [part for name in ("--harmful", "--harmless", "--everyday") for part in (name, str(rows))]
    return ["eval", "--base", str(llama), *asked, *sizes]


def test_judges_and_kinds_of_over_refusal_are_printed(arguments, service) -> None:
    endpoint = ["--judge", "matcher", "--judge", "endpoint", "--judge-url", service.url, "--judge-model", "j"]
    result = RUN.invoke(app, [*arguments, *endpoint])
    assert result.exit_code == 0, result.stderr
    titles = [line[:36].strip() for line in result.stdout.splitlines()]
    assert titles == [
        "harmful score",
        "incoherent",
        "harmful score by matcher",
        "harmful score by endpoint",
        "unlike the first judge: endpoint",
        "over-refusal",
        "of look-alikes",
        "of everyday prompts",
    ]
    assert "n 2)" in result.stdout
    assert "n 4)" in result.stdout


def test_a_silent_judge_ends_the_command(arguments, service, monkeypatch) -> None:
    monkeypatch.setattr(Responder, "__call__", lambda _self, asked: ["Step 1: go"] * len(asked))
    service.answer = lambda _body: {}
    endpoint = ["--judge", "endpoint", "--judge-url", service.url, "--judge-model", "j", "--judge-api", "moderations"]
    result = RUN.invoke(app, [*arguments, *endpoint])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "the moderation endpoint did not return 2 results" in result.stderr


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        (["--judge", "guess"], "kind"),
        (["--judge", "classifier"], "name the model with --classifier and its --harmful-label"),
        (["--judge", "endpoint"], "name it with --judge-url and --judge-model"),
    ],
)
def test_an_incomplete_judge_is_one_line(arguments, judge, message) -> None:
    result = RUN.invoke(app, [*arguments, *judge])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert message in line


def test_the_bench_takes_the_same_settings(tmp_path: Path) -> None:
    values = {"name": "x", "blocks": [{"methods": ["sft"], "tasks": ["sentiment"]}]}
    judges = [{"kind": "matcher"}, {"kind": "endpoint", "url": "http://127.0.0.1:1/v1", "model": "j"}]
    made = Workspace(BenchConfig.of({**values, "judges": judges}), tmp_path).judges
    assert list(made) == ["matcher", "endpoint"]
    assert isinstance(made["endpoint"], ChatJudge)
    with pytest.raises(UsageError, match="two judges"):
        BenchConfig.of({**values, "judges": [{}, {}]})
