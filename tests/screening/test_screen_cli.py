"""The commands `screen` and `review`: exit codes, JSON, and one line per error."""

import json

import pytest
import typer
from typer.testing import CliRunner

from reft_ray.cli import review
from reft_ray.cli import screen as command
from reft_ray.testbed.word_scorer import WordScorer

app = typer.Typer()
app.command("screen")(command.screen)
app.add_typer(review.app, name="review")


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a command; the teacher at --teacher is a word scorer."""
    monkeypatch.setattr(command, "load_scorer", lambda teacher, base, precision: WordScorer())
    (tmp_path / "teacher").mkdir()

    def invoke(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return invoke


@pytest.fixture
def screened(run, dataset, tmp_path):
    result = run("screen", dataset, "--teacher", tmp_path / "teacher", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    return tmp_path / "out"


def test_screening_prints_what_happened(run, dataset, tmp_path):
    result = run("screen", dataset, "--teacher", tmp_path / "teacher", "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert "score_above_block: 20 (rows 10, 20, 30" in result.stdout
    assert "174 of 210 rows may be trained on" in result.stdout
    assert "amber" not in result.output


def test_the_threshold_of_the_dataset_can_be_switched_off(run, dataset, tmp_path):
    arguments = ("screen", dataset, "--teacher", tmp_path / "teacher", "--out")
    assert "the threshold of this dataset is -0.150" in run(*arguments, tmp_path / "on").stdout
    high = run(*arguments, tmp_path / "high", "--job-threshold-floor", "0").stdout
    assert "the operator's thresholds alone apply to this dataset" in high
    floor = run(*arguments, tmp_path / "floor", "--job-threshold-floor", "-0.5", "--json").stdout
    assert (json.loads(floor)["job_threshold"]["own"], json.loads(floor)["job_threshold"]["floor"]) == (-0.5, -0.5)
    assert run(*arguments, tmp_path / "bad", "--job-threshold-floor", "2").exit_code == 2
    off = run(*arguments, tmp_path / "off", "--no-job-threshold", "--json").stdout
    assert json.loads(off)["job_threshold"] is None
    assert not (tmp_path / "off" / ".screen" / "judged").exists()


def test_json_is_one_document(run, dataset, tmp_path):
    result = run("screen", dataset, "--teacher", tmp_path / "teacher", "--out", tmp_path / "out", "--json")
    assert json.loads(result.stdout)["kept"] == 174


def test_a_refused_dataset_exits_with_three(run, dataset, tmp_path):
    arguments = ("screen", dataset, "--teacher", tmp_path / "teacher", "--out", tmp_path / "out")
    result = run(*arguments, "--max-reject-ratio", "0.01")
    assert result.exit_code == 3
    assert "more than the 1.0% allowed" in result.stderr
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--column", "prompt"], "expected FIELD=COLUMN"),
        (["--format", "poem"], "--format poem: there are chat,"),
        (["--guard", "magic"], "expected the URL"),
        (["--review-threshold", "0.1"], "must be set together"),
        (["--review-threshold", "0.9", "--block-threshold", "0.1"], "thresholds need"),
        (["--no-finding", "x"], "no finding is named x"),
        (["--teacher", "nowhere"], "no Ref-Teacher at nowhere"),
    ],
)
def test_usage_errors_are_one_line(run, dataset, tmp_path, arguments, message):
    result = run("screen", dataset, "--teacher", tmp_path / "teacher", "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_review_from_list_to_export(run, screened, tmp_path):
    listed = run("review", "list", screened, "--limit", 2)
    assert "26 withheld: 26 pending, 0 approved, 0 rejected" in listed.stdout
    assert "bomb" in run("review", "show", screened, 10).stdout
    assert run("review", "approve", screened, 10, 20, "--reason", "fiction", "--reviewer", "ada").exit_code == 0
    assert run("review", "reject", screened, 30, "--reason", "harmful", "--reviewer", "ada").exit_code == 0
    summary = json.loads(run("review", "list", screened, "--show", "decided", "--json").stdout)
    assert summary["summary"] == {
        "withheld": 26, "pending": 23, "approved": 2, "rejected": 1, "overturn_rate": 2 / 3,
    }  # fmt: skip
    assert [row["row_number"] for row in summary["rows"]] == [10, 20, 30]
    assert run("review", "export", screened, "--to", tmp_path / "labels.jsonl").exit_code == 0
    assert len((tmp_path / "labels.jsonl").read_text().splitlines()) == 3
    assert run("review", "export", screened, "--to", tmp_path / "labels.jsonl").exit_code == 2


def test_reviewing_a_missing_row_or_screening(run, screened, tmp_path):
    assert "row 1 is not in the quarantine" in run("review", "approve", screened, 1, "--reason", "x").stderr
    missing = run("review", "list", tmp_path / "nothing")
    assert missing.exit_code == 1
    assert "no finished screening" in missing.stderr


def test_text_cannot_drive_the_terminal(run, tmp_path):
    path = tmp_path / "r\x1b[2Jows.jsonl"
    rows = [{"prompt": "bomb \x1b[2J", "response": "x"}, {"prompt": "tea", "response": "y"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("screen", path, "--teacher", tmp_path / "teacher", "--out", tmp_path / "out")
    shown = run("review", "show", tmp_path / "out", 1).stdout
    assert "bomb" in shown
    assert "\x1b" not in shown
