"""An organisation's files and jobs move from a recorded OpenAI to a running service of ours."""

import json

import pytest
from fixtures.sqlite import sqlite_url
from migrate.recorded_openai import CONTENTS, KEY, RecordedOpenAI
from typer.testing import CliRunner

from reft_ray.api.chat_model import EchoChat
from reft_ray.api.moderator import LocalModerator
from reft_ray.api.service_app import create_service_app
from reft_ray.api.settings import BaseModelSettings, ServiceSettings
from reft_ray.api.stores import Stores
from reft_ray.cli.main import app
from reft_ray.core.errors import ReftError
from reft_ray.jobs.database import Database
from reft_ray.migrate.source import OpenAISource
from reft_ray.testbed.word_scorer import WordScorer


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    recorded = RecordedOpenAI()
    yield recorded
    recorded.close()


@pytest.fixture
def service(serving, tmp_path):
    settings = ServiceSettings(base_models={"ours": BaseModelSettings(uri="/models/ours")})
    stores = Stores.open(Database.open(sqlite_url(tmp_path)), str(tmp_path / "store"), settings)
    screenings = str(tmp_path / "screenings")
    with serving(
        create_service_app(LocalModerator(WordScorer()), stores, EchoChat(), screenings_uri=screenings)
    ) as url:
        yield url, stores


def migrate(recorded, out, *options):
    return CliRunner().invoke(app, ["migrate", "openai", "--from", recorded.url, "--out", str(out), *options])


def record_of(out):
    return json.loads((out / "migration.json").read_text())


def test_everything_is_listed_validated_and_planned_before_anything_runs(recorded, tmp_path):
    out = tmp_path / "out"
    result = migrate(recorded, out, "--model", "ours")
    assert result.exit_code == 0, result.output
    record = record_of(out)
    assert set(record["files"]) == set(CONTENTS)
    for file_id, entry in record["files"].items():
        path = (out / entry["path"]).resolve()
        assert path.is_relative_to((out / "files").resolve())
        assert path.read_bytes() == CONTENTS[file_id]
    assert record["files"]["file-clean"]["validation"]["rows"] == 12
    assert record["files"]["file-broken"]["validation"]["invalid"] == 1
    plain = record["jobs"]["ftjob-plain"]["plan"]
    assert plain["body"] == {
        "model": "ours", "training_file": "file-clean", "seed": 7, "suffix": "support",
        "method": {"type": "supervised", "supervised": {"hyperparameters": {
            "n_epochs": 3, "batch_size": 1, "learning_rate_multiplier": 1.8}}},
    }  # fmt: skip
    assert [found["field"] for found in plain["deviations"]] == ["model"]
    assert [found["field"] for found in record["jobs"]["ftjob-wandb"]["plan"]["deviations"]] == [
        "model",
        "integrations",
    ]
    assert record["jobs"]["ftjob-wandb"]["plan"]["body"]["suffix"] == "mine"
    for name, field in (("ftjob-dpo", "method.type"), ("ftjob-gone", "training_file")):
        assert record["jobs"][name]["plan"]["body"] is None
        assert record["jobs"][name]["plan"]["deviations"][-1]["field"] == field
        assert f"{name} (succeeded): cannot run here" in result.output
    assert "integrations: Integrations are not supported" in result.output
    assert "created" not in json.dumps(record["jobs"]["ftjob-plain"]["plan"])


def test_jobs_are_replayed_once_on_our_service(recorded, service, tmp_path):
    (url, stores), out = service, tmp_path / "out"
    result = migrate(recorded, out, "--url", url, "--model", "ours", "--run")
    assert result.exit_code == 0, result.output
    record = record_of(out)
    assert record["files"]["file-poisoned"]["screening"] == {"allow": 11, "block": 1, "first_lines": [12]}
    created = {name: job["created"] for name, job in record["jobs"].items() if "created" in job}
    assert set(created) == {"ftjob-plain", "ftjob-wandb", "ftjob-poisoned"}
    job = stores.jobs.get(created["ftjob-poisoned"])
    assert (job.spec.model, job.spec.seed, dict(job.metadata)) == ("ours", 7, {"team": "a"})
    assert b"".join(stores.files.read(job.spec.training_file, job.project_id)) == CONTENTS["file-poisoned"]
    assert job.spec.validation_file == stores.jobs.get(created["ftjob-plain"]).spec.training_file
    downloads = [path for path in recorded.paths if path.endswith("/content")]
    assert migrate(recorded, out, "--url", url, "--model", "ours", "--run").exit_code == 0
    assert [path for path in recorded.paths if path.endswith("/content")] == downloads
    assert {name: one.get("created") for name, one in record_of(out)["jobs"].items()} == {
        name: one.get("created") for name, one in record["jobs"].items()
    }


def test_mistakes_are_one_line(recorded, tmp_path, monkeypatch):
    assert "--run needs" in migrate(recorded, tmp_path, "--run").output
    no_model = migrate(recorded, tmp_path / "a")
    assert "add --model gpt-4o-mini-2024-07-18=OURS" in no_model.output
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
    wrong = migrate(recorded, tmp_path / "b", "--model", "ours")
    assert wrong.exit_code == 1
    assert "Incorrect API key provided" in wrong.output
    monkeypatch.delenv("OPENAI_API_KEY")
    assert "OPENAI_API_KEY is not set" in migrate(recorded, tmp_path / "c").output


def test_transient_errors_are_repeated(recorded):
    recorded.fails = [429, 500]
    with OpenAISource(recorded.url, KEY, pause=0) as source:
        assert len(source.jobs()) == 5
        recorded.fails = [404]
        with pytest.raises(ReftError, match=r"/v1/files: busy"):
            source.files()
