"""LocalRun: a run resumes from its checkpoint only with the same kept rows."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken
from typer.testing import CliRunner

from reft_ray.cli.main import app
from reft_ray.core.conversation import Example
from reft_ray.core.errors import ReftError
from reft_ray.finetuning.config import FinetuneConfig, Resources
from reft_ray.finetuning.encoding import pair_of
from reft_ray.finetuning.prompts import read_labelled
from reft_ray.hf.loading import load_tokenizer
from reft_ray.hf.teacher_card import alignment_file
from reft_ray.pipeline import local_run
from reft_ray.pipeline.local_run import LocalRun
from reft_ray.screening.kept_rows import kept_rows
from reft_ray.teachers import teacher_folder


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
    monkeypatch: pytest.MonkeyPatch,
    llama: Path,
    tmp_path: Path,
    method: str,
    threshold: float | None,
    wanted: bool,
    applies: bool,
) -> None:
    configs = []
    counts = dict.fromkeys(("rows", "kept", "review", "blocked", "invalid"), 0)

    def screen(data, out, factory, config, *_):
        configs.append(config)
        return SimpleNamespace(**counts)

    monkeypatch.setattr(local_run, "screen", screen)
    monkeypatch.setattr(local_run, "check_teacher", lambda *_: None)
    monkeypatch.setattr(local_run.RefTeacher, "load", lambda folder: SimpleNamespace(folder=folder))
    config = FinetuneConfig.of({"base": str(llama), "method": method, "threshold": threshold})
    run = LocalRun(
        config, Resources(workers=0), tmp_path / "out", tmp_path, job_threshold=wanted, job_threshold_floor=0.1
    )
    assert run.screen(["rows.jsonl"]) == counts
    assert [(config.job_threshold, config.job_threshold_floor) for config in configs] == [(applies, 0.1)]


def test_pairs_tools_and_validation_rows_reach_training(llama: Path, tmp_path: Path) -> None:
    rows, held = tmp_path / "pairs.jsonl", tmp_path / "held.jsonl"
    pairs = [{"prompt": f"tell me {n}", "chosen": "sure", "rejected": "no sorry"} for n in range(4)]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    held.write_text(json.dumps({"prompt": "please", "response": "sure"}) + "\n")
    out = tmp_path / "student"
    command = ["finetune", str(rows), "--base", str(llama), "--method", "sft", "--out", str(out), "--workers", "0"]
    settings = ["loss=dpo", "epochs=2", "lora.rank=4", "select=best", "checkpoint_every=1", "log_every=1"]
    command += [argument for setting in settings for argument in ("--set", setting)]
    found = CliRunner().invoke(app, [*command, "--validation", str(held), "--track", "tensorboard", "--json"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["rows"]["kept"] == 4
    assert {"adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {p.name for p in out.iterdir()}
    assert list((tmp_path / "student.track/student").glob("events.*"))
    chosen = pair_of(Example(next(turns for _, turns in kept_rows(str(tmp_path / "student.screening")))))
    assert [side.response for side in chosen] == ["sure", "no sorry"]


def test_control_tokens_without_a_role_are_refused(llama: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(llama))
    tokenizer.add_tokens([AddedToken("<|eot_id|>", special=True)])
    assert "<|eot_id|>" not in tokenizer.all_special_tokens
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    tokenizer.save_pretrained(base)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "hi", "response": "no<|eot_id|>"}\n{"prompt": "hi", "response": "no"}\n')
    run = LocalRun(FinetuneConfig.of({"base": str(base), "method": "sft"}), Resources(workers=0), tmp_path / "x", None)
    assert {name: run.screen([str(rows)])[name] for name in ("kept", "invalid")} == {"kept": 1, "invalid": 1}


def test_a_run_without_alignment_rows_takes_those_of_the_teacher(tmp_path: Path) -> None:
    config = FinetuneConfig.of({"base": "smollm2", "method": "guided"})
    run = LocalRun(config, Resources(workers=0), tmp_path / "out", teacher_folder("builtin"))
    rows = read_labelled(alignment_file(teacher_folder("builtin")))
    assert [row.messages for row in run.alignment] == [row.messages for row in rows]
    mine = LocalRun(config, Resources(workers=0), tmp_path / "out", teacher_folder("builtin"), rows[:2])
    assert len(mine.alignment) == 2
