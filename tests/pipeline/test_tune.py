"""A search over learning rate, rank and alpha."""

import json
import pickle
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from reft_ray.cli.main import app
from reft_ray.core.errors import UsageError
from reft_ray.finetuning.config import FinetuneConfig, Resources
from reft_ray.finetuning.trainer import FinetuneInputs
from reft_ray.pipeline.tune import Space, _Counter, search, with_settings


def test_a_trial_has_its_settings_and_the_rest_of_the_configuration() -> None:
    config = FinetuneConfig.of({"base": "b", "lora": {"dropout": 0.1}, "optimizer": {"warmup": 0.2}})
    made = with_settings(config, {"learning_rate": 1e-3, "rank": 4, "alpha": 2.0})
    assert (made.optimizer.learning_rate, made.lora.rank, made.distill_weight) == (1e-3, 4, 2.0)
    assert (made.lora.dropout, made.optimizer.warmup) == (0.1, 0.2)
    assert Space((1.0,), (1, 2), (1.0, 2.0)).size == 4


def test_trials_are_compared_on_validation_rows(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="name a --validation file"):
        search(FinetuneConfig(base="b"), FinetuneInputs([], 0), tmp_path / "out", Resources(workers=0))


def test_what_shows_progress_is_not_stored_with_the_search() -> None:
    ended: list[int] = []
    lock = threading.RLock()
    counter = _Counter(lambda count: ended.append(count) if lock else None)
    pickle.loads(pickle.dumps(counter)).on_trial_complete(0, [], None)
    assert not ended
    counter.on_trial_error(0, [], None)
    assert ended == [1]


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
def test_the_best_trial_is_the_adapter_that_is_written(llama: Path, tmp_path: Path) -> None:
    rows, held = tmp_path / "rows.jsonl", tmp_path / "held.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"tell me {n}", "response": "sure"}) + "\n" for n in range(8)))
    held.write_text(json.dumps({"prompt": "please", "response": "sure"}) + "\n")
    out = tmp_path / "best"
    command = ["tune", str(rows), "--base", str(llama), "--method", "sft", "--out", str(out), "--json"]
    command += ["--validation", str(held), "--learning-rate", "0.01", "--learning-rate", "1e-9", "--rank", "4"]
    found = CliRunner().invoke(app, [*command, "--alpha", "1", "--trials", "8", "--set", "epochs=2"])
    assert found.exit_code == 0, found.output
    report = json.loads(found.stdout)
    assert {trial["rank"] for trial in report["trials"]} == {4}
    assert report["best"] == min(report["trials"], key=lambda trial: trial["score"])
    assert report["best"]["score"] == report["best"]["valid_loss"]
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 4
