"""LocalRun: a run resumes from its checkpoint only with the same kept rows."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from reft_ray.core.errors import ReftError
from reft_ray.finetuning.config import FinetuneConfig, Resources
from reft_ray.pipeline import local_run
from reft_ray.pipeline.local_run import LocalRun


def test_a_run_id_belongs_to_the_rows_that_were_kept(llama: Path, tmp_path: Path) -> None:
    config = FinetuneConfig.of({"base": str(llama), "method": "sft", "epochs": 1, "lora": {"rank": 4}})

    def finetuned(name: str, word: str) -> Path:
        rows = tmp_path / f"{name}.jsonl"
        rows.write_text("".join(json.dumps({"prompt": f"tell me {n}", "response": word}) + "\n" for n in range(4)))
        run = LocalRun(config, Resources(workers=0), tmp_path / name, None)
        assert run.screen([str(rows)])["kept"] == 4
        return run.train("mine")

    finetuned("a", "sure")
    # Screening the same rows again gives the same hash.
    finetuned("again", "sure")
    with pytest.raises(ReftError, match="written with a different dataset: choose a new run id or remove it"):
        finetuned("b", "no")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("method", "threshold", "wanted", "applies"),
    [
        ("filter", None, True, True),
        ("filter", None, False, False),
        ("filter", 0.3, True, False),
        ("sft", None, True, False),
    ],
)
def test_a_threshold_of_the_configuration_replaces_that_of_the_dataset(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str, threshold: float | None, wanted: bool, applies: bool
) -> None:
    configs = []
    counts = dict.fromkeys(("rows", "kept", "review", "blocked", "invalid"), 0)

    def screen(data, out, factory, config, *_):
        configs.append(config)
        return SimpleNamespace(**counts)

    monkeypatch.setattr(local_run, "screen", screen)
    monkeypatch.setattr(local_run, "check_teacher", lambda *_: None)
    monkeypatch.setattr(local_run.RefTeacher, "load", lambda folder: SimpleNamespace(folder=folder))
    config = FinetuneConfig.of({"base": "base", "method": method, "threshold": threshold})
    run = LocalRun(
        config, Resources(workers=0), tmp_path / "out", tmp_path, job_threshold=wanted, job_threshold_floor=0.1
    )
    assert run.screen(["rows.jsonl"]) == counts
    assert [(config.job_threshold, config.job_threshold_floor) for config in configs] == [(applies, 0.1)]
