"""The commands: quick help, one line per error, exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from reft_ray.cli.common import parse_settings
from reft_ray.cli.main import app
from reft_ray.core.errors import UsageError

RUN = CliRunner()
ROWS = [
    {"prompt": f"how to {verb} a {thing}", "label": label, "source": "s", "response": answer}
    for verb, label, answer in (("steal", "harmful", "sorry i cannot"), ("bake", "harmless", "here is how"))
    for thing in ("car", "bread", "me", "that")
]


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, reft_ray.cli.main; "
        "print(sorted({'torch', 'ray', 'transformers', 'fastapi', 'pyarrow', 'pydantic'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_deprecation_warnings_of_libraries_are_hidden() -> None:
    """Also in processes that a command starts."""
    warns = "import warnings; warnings.warn('soon gone', FutureWarning)"
    code = (
        "import subprocess, sys\n"
        "from reft_ray.cli.main import main\n"
        "sys.argv = ['reft-ray', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"subprocess.run([sys.executable, '-c', {warns!r}])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert found.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["teacher", "show", "/nowhere"], 1, "no Ref-Teacher at /nowhere"),
        (["teacher", "train", "--base", "/nowhere", "--prompts", "ROWS", "--out", "OUT"], 1, "no base model"),
        (["teacher", "train", "--base", "B", "--prompts", "BAD", "--out", "OUT"], 1, "bad.jsonl:2: not valid JSON"),
        (["teacher", "train", "--base", "B", "--prompts", "ROWS", "--out", "OUT", "--set", "epoch=1"], 2,
         "epoch: unknown key, did you mean epochs?"),
        (["teacher", "train", "--base", "B", "--prompts", "absent.jsonl", "--out", "OUT"], 1,
         "No such file or directory: absent.jsonl"),
        (["finetune", "ROWS", "--base", "B", "--out", "OUT"], 2, "method guided filters: name a --teacher"),
        (["eval", "--base", "B"], 2, "name at least one of --harmful, --harmless, --everyday and --task"),
        (["eval", "--base", "B", "--task", "ROWS", "--match", "number"], 1,
         "rows.jsonl:1: the reference answer holds no number to compare with (match=number)"),
        (["teacher", "evaluate", "--teacher", "T", "--prompts", "HARMFUL"], 1,
         "the labelled prompts hold no harmless row: both labels are needed"),
        (["teacher", "thresholds", "--teacher", "T", "--prompts", "HARMFUL"], 1,
         "the labelled prompts hold no harmless row: both labels are needed"),
        (["teacher", "build", "--base", "B", "--prompts", "ROWS", "--out", "OUT", "--set", "weights=lora", "--set",
          "feature_mix=0.5"], 2, "feature_mix scales the adapter of trained features"),
        (["teacher", "check", "--teacher", "/nowhere", "--harmful", "ROWS", "--harmless", "ROWS"], 1,
         "no Ref-Teacher at /nowhere"),
        (["teacher", "check", "--teacher", "T", "--harmful", "ROWS", "--harmless", "ROWS", "--max-hs", "101"], 1,
         "the limit on harmful score is a percentage, not 101"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line_and_the_right_code(
    tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    places = {
        "ROWS": str(jsonl(tmp_path / "rows.jsonl", ROWS)),
        "BAD": str(tmp_path / "bad.jsonl"),
        "OUT": str(tmp_path / "out"),
        "HARMFUL": str(jsonl(tmp_path / "harmful.jsonl", ROWS[:4])),
    }
    (tmp_path / "bad.jsonl").write_text(json.dumps(ROWS[0]) + "\n{oops\n")
    result = RUN.invoke(app, [places.get(argument, argument) for argument in arguments])
    assert result.exit_code == code
    lines = [line for line in result.stderr.splitlines() if not line.startswith("note:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_teacher_is_trained_evaluated_and_shown(llama: Path, tmp_path: Path) -> None:
    prompts = jsonl(tmp_path / "prompts.jsonl", ROWS)
    rows = jsonl(tmp_path / "rows.jsonl", [{**row, "prompt": f"please {row['prompt']}"} for row in ROWS])
    out = tmp_path / "teacher"
    arguments = ["teacher", "train", "--base", str(llama), "--prompts", str(prompts), "--validation", str(rows)]
    settings = ["--set", "epochs=3", "--set", "optimizer.learning_rate=0.01", "--set", "lora.rank=4"]
    trained = RUN.invoke(app, [*arguments, *settings, "--out", str(out), "--json"])
    assert trained.exit_code == 0, trained.stderr
    shown = json.loads(trained.stdout)
    assert shown["config"]["lora"]["rank"] == 4
    measured = RUN.invoke(app, ["teacher", "evaluate", "--teacher", str(out), "--prompts", str(rows), "--json"])
    report = json.loads(measured.stdout)
    assert report["teacher"] == shown["id"]
    assert report["overall"]["rows"] == report["sources"]["s"]["rows"] == 8
    assert {"auroc", "auprc", "recall_at_1_fpr"} <= report["sources"]["s"].keys()
    assert report["overall"]["auroc"] == pytest.approx(shown["quality"]["auroc"])
    table = RUN.invoke(app, ["teacher", "evaluate", "--teacher", str(out), "--prompts", str(rows)])
    assert "overall" in table.stdout
    assert shown["id"] in RUN.invoke(app, ["teacher", "show", str(out)]).stdout


def test_validation_prompts_are_not_trained_on(tmp_path: Path) -> None:
    prompts = jsonl(tmp_path / "prompts.jsonl", ROWS)
    held = jsonl(tmp_path / "held.jsonl", [row for row in ROWS if row["label"] == "harmless"])
    arguments = ["teacher", "train", "--base", "B", "--prompts", str(prompts), "--validation", str(held)]
    result = RUN.invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    note, error = result.stderr.splitlines()
    assert note == "note: 4 rows are skipped, because their prompts are validation prompts"
    assert error == "error: the training prompts hold no harmless row: both labels are needed"


def test_eval_prints_measures_with_intervals(llama: Path, tmp_path: Path) -> None:
    rows = jsonl(tmp_path / "rows.jsonl", ROWS)
    arguments = ["eval", "--base", str(llama), "--harmful", str(rows), "--task", str(rows), "--max-new-tokens", "4"]
    result = RUN.invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.stderr
    measures = json.loads(result.stdout)["measures"]
    assert measures["harmful_score"]["n"] == 8
    low, high = measures["harmful_score"]["interval"]
    assert 0 <= low <= measures["harmful_score"]["value"] <= high <= 100


def test_settings_are_json_or_text_and_nest() -> None:
    assert parse_settings(["a.b=1e-3", "a.c=text", "d=null"]) == {"a": {"b": 1e-3, "c": "text"}, "d": None}
    with pytest.raises(UsageError, match="write it as key=value"):
        parse_settings(["oops"])


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("Ray was started"))


def test_finetune_trains_in_this_process_and_shows_its_phases(llama: Path, tmp_path: Path, no_ray: None) -> None:
    rows = [{"messages": [{"role": "user", "content": "tell me"}, {"role": "assistant", "content": "no"}]}] * 4
    data, out = jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "student"
    arguments = ["finetune", str(data), "--base", str(llama), "--method", "sft", "--set", "epochs=1"]
    result = RUN.invoke(app, [*arguments, "--out", str(out)])
    assert result.exit_code == 0, result.stderr
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == [
        "starting",
        "screening",
        "loading",
        "training",
        "export",
    ]
    assert result.stdout == f"{out}: sft on 4 of 4 rows\n"
    quiet = RUN.invoke(app, [*arguments, "--out", str(tmp_path / "quiet"), "--json"])
    assert quiet.stderr == ""
    assert json.loads(quiet.stdout)["rows"]["kept"] == 4


@pytest.mark.parametrize(
    ("options", "cluster", "here", "expected"),
    [
        ({}, None, 0, (0, 0, None)),
        ({}, None, 1, (0, 1, None)),
        ({}, None, 8, (8, 1, None)),
        ({"strategy": "fsdp"}, None, 8, (8, 1, None)),
        ({"workers": 0}, None, 8, (0, 1, None)),
        ({"gpus": 0}, None, 1, (0, 0, None)),
        ({"gpus": 2}, None, 1, (1, 2, None)),
        ({}, 16, 0, (1, 1, None)),
        ({"workers": 16}, 16, 0, (16, 1, None)),
        ({}, 0, 1, (1, 0, None)),
        ({"strategy": "fsdp"}, None, 0, (1, 0, 6)),
        ({"storage": "s3://bucket/runs"}, None, 0, (1, 0, 6)),
        ({"workers": 4}, None, 0, (4, 0, 1)),
        ({"workers": 2, "cpus": 1.5}, None, 0, (2, 0, 1.5)),
    ],
)
def test_workers_cpus_and_gpus_are_those_that_there_are(
    monkeypatch: pytest.MonkeyPatch, options: dict, cluster: int | None, here: int, expected: tuple
) -> None:
    """`cluster` and `here` are the GPUs of RAY_ADDRESS and of this machine."""
    from reft_ray.cli.resources import resources_of

    monkeypatch.setattr("torch.cuda.is_available", lambda: here > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: here)
    monkeypatch.setattr("reft_ray.local_ray.join_ray", lambda: True)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": float(cluster or 0)})
    monkeypatch.setattr("reft_ray.hf.machine.available_cpus", lambda: 6)
    monkeypatch.setenv("RAY_ADDRESS", "" if cluster is None else "ray:6379")
    values = {"workers": None, "gpus": None, "cpus": None, "strategy": "data_parallel", "storage": None, **options}
    found = resources_of(*values.values())
    assert (found.workers, found.gpus_per_worker, found.cpus_per_worker) == expected
