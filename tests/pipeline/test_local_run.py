"""LocalRun: a run resumes from its checkpoint only with the same kept rows."""

import json
from pathlib import Path

import pytest

from reft_ray.core.errors import ReftError
from reft_ray.finetuning.config import FinetuneConfig, Resources
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
