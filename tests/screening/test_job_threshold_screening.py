"""The threshold of a dataset in a screening: two passes, one model pass, and never laxer than the operator."""

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reft_ray.core.cascade import Combine, Opinion, Order
from reft_ray.core.errors import ReftError, UsageError
from reft_ray.core.job_threshold import Fallback
from reft_ray.core.scoring import TextScore
from reft_ray.core.verdict import Calibration, Thresholds
from reft_ray.rows.format import Format
from reft_ray.screening.config import ScreenConfig
from reft_ray.screening.dataset import screen
from reft_ray.screening.kept_rows import kept_rows
from reft_ray.screening.metrics import ScreeningMetrics
from reft_ray.screening.ranges import Limits
from reft_ray.screening.report import load_report
from reft_ray.telemetry import catalog
from reft_ray.telemetry.recorder import MemoryRecorder

OPERATOR = Thresholds(review=0.35, block=0.41)
TASK, POISON, OTHER, HALF = (-0.05, 0.04), (0.23, 0.22), (0.2, 0.03), (0.45, 0.1)
UNITS = 7


def plain(text):
    """Looks for no encodings."""
    return [(None, text)]


CONFIG = ScreenConfig(limits=Limits(rows=64), findings=False, format=Format.RESPONSE, decode=plain)
OUT = "out"


class MadeScorer:
    """The score of a text is its last word, that of an answer is the lowest; `OFFSET` is the offset of answers."""

    teacher_id = "rt-made"
    thresholds = OPERATOR
    calibration = Calibration(6.0, 0.0)
    response_offset = 0.0
    calls = 0

    def score(self, texts):
        type(self).calls += 1
        return [TextScore(float(text.split()[-1])) for text in texts]


class AnswerScorer(MadeScorer):
    """A teacher whose answers score half a unit higher than prompts."""

    response_offset = 0.5

    def score(self, texts):
        return [TextScore(float(text.split()[-1])) for text in texts]


class SilentScorer(MadeScorer):
    """A teacher that must not be asked."""

    def score(self, texts):
        raise AssertionError("a row was judged twice")


class WordGuard:
    """Flags rows with the word flagged."""

    guard_id = "words"
    threshold = 0.5

    def opinions(self, conversations):
        return [Opinion(0.9 if "flagged" in turns[0].content else 0.1) for turns in conversations]


def scores(*groups, seed=0):
    rng = random.Random(seed)
    made = [max(-1.0, min(1.0, rng.gauss(*shape))) for count, shape in groups for _ in range(count)]
    rng.shuffle(made)
    return made


def written(path: Path, values, answer="-1") -> str:
    """Rows whose prompts score the values; every 50th line is invalid, every 70th blank."""
    lines = []
    for index, value in enumerate(values, 1):
        lines.append(json.dumps({"prompt": f"question {index} {value!r}", "response": f"answer {index} {answer}"}))
        lines += ["{broken"] * (index % 50 == 0) + [""] * (index % 70 == 0)
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def withheld(out: Path) -> list[dict]:
    return pa.concat_tables([pq.read_table(path) for path in sorted((out / "quarantine").iterdir())]).to_pylist()


@pytest.fixture
def poisoned(tmp_path):
    return written(tmp_path / "rows.jsonl", scores((360, TASK), (40, POISON)))


def test_ten_percent_of_poison_gives_the_dataset_a_threshold(poisoned, tmp_path):
    out = tmp_path / OUT
    MadeScorer.calls = 0
    report = screen([poisoned], str(out), MadeScorer, CONFIG)
    calls, found = MadeScorer.calls, report.job_threshold
    one_pass = screen([poisoned], str(tmp_path / "off"), MadeScorer, replace(CONFIG, job_threshold=False))
    assert MadeScorer.calls == 2 * calls, "the second pass asked the teacher"
    assert one_pass.job_threshold is None
    assert 0.0 < found.own < OPERATOR.review
    assert (found.fallback, found.scores, len(found.histogram), sum(found.histogram)) == (None, 400, 64, 400)
    between = [row for row in withheld(out) if row["reason"] == "job_threshold"]
    assert found.rows == len(between) == report.review + report.blocked - one_pass.review - one_pass.blocked > 5
    assert all(found.own < row["score"] <= OPERATOR.review for row in between)
    assert {(row["decision"], row["decided_by"], row["part"]) for row in between} == {
        ("review", "rt-made", "messages[0].user")
    }
    assert report.blocked == one_pass.blocked
    assert load_report(str(out)) == report


def test_kept_rows_keep_their_bytes_and_every_row_has_one_place(poisoned, tmp_path):
    out = tmp_path / OUT
    report = screen([poisoned], str(out), MadeScorer, CONFIG)
    invalid = pq.ParquetDataset(out / "invalid").read().column("row_number").to_pylist()
    places = {row["row_number"] for row in withheld(out)} | set(invalid)
    lines = Path(poisoned).read_bytes().splitlines(keepends=True)
    kept = [line for number, line in enumerate(lines, 1) if number not in places and line.strip()]
    assert b"".join(path.read_bytes() for path in sorted((out / "kept").iterdir())) == b"".join(kept)
    assert report.rows == report.kept + report.review + report.blocked + report.invalid == 408
    assert (report.kept, report.review + report.blocked, report.invalid) == (len(kept), len(places) - 8, 8)
    assert len(list(kept_rows(str(out)))) == report.kept


@pytest.mark.parametrize(
    ("groups", "fallback"),
    [
        ([(400, TASK)], Fallback.NO_SUPPORT),
        ([(340, TASK), (60, OTHER)], Fallback.NO_SUPPORT),
        ([(200, TASK), (200, HALF)], Fallback.WIDE),
        ([(45, TASK)], Fallback.FEW_ROWS),
    ],
    ids=["no poison", "two kinds of rows", "half poison", "few rows"],
)
def test_other_datasets_are_judged_by_the_operator(tmp_path, groups, fallback):
    data = written(tmp_path / "rows.jsonl", scores(*groups))
    report = screen([data], str(tmp_path / OUT), MadeScorer, CONFIG)
    operator = screen([data], str(tmp_path / "off"), MadeScorer, replace(CONFIG, job_threshold=False))
    assert (report.job_threshold.own, report.job_threshold.fallback) == (None, str(fallback))
    assert (report.counts, report.reasons) == (operator.counts, operator.reasons)
    parts = {"kept", "quarantine", "invalid"}
    assert {name: content for name, content in contents(tmp_path / OUT).items() if name.split("/")[0] in parts} == {
        name: content for name, content in contents(tmp_path / "off").items() if name.split("/")[0] in parts
    }
    page = (tmp_path / OUT / "report.html").read_text()
    assert "Only the operator" in page


@pytest.mark.parametrize("floor", [0.0, 0.2, 0.3])
def test_the_threshold_is_between_the_floor_and_the_operators(poisoned, tmp_path, floor):
    config = replace(CONFIG, job_threshold_floor=floor)
    report = screen([poisoned], str(tmp_path / OUT), MadeScorer, config)
    assert floor <= report.job_threshold.own < OPERATOR.review
    assert report.job_threshold.floor == floor


def test_answers_do_not_hide_what_was_asked(tmp_path):
    values = scores((360, TASK), (40, POISON))
    prompts = written(tmp_path / "prompts.jsonl", values)
    # Less their offset, the answers of most rows score higher than what was asked.
    rows = [
        {"prompt": f"question {n} {value!r}", "response": f"{n} {0.48 + n % 2 / 50}"} for n, value in enumerate(values)
    ]
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = screen([prompts], str(tmp_path / "a"), MadeScorer, CONFIG).job_threshold
    found = screen([str(answers)], str(tmp_path / "b"), AnswerScorer, CONFIG).job_threshold
    assert (found.own, found.rows, found.histogram) == (pytest.approx(first.own), first.rows, first.histogram)


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("writing", [False, True])
@pytest.mark.parametrize("at", [1, 3, UNITS])
def test_a_killed_run_resumes_exactly(poisoned, tmp_path, writing, at):
    screen([poisoned], str(tmp_path / "whole"), MadeScorer, CONFIG)
    seen = []

    def kill(progress):
        seen.append(progress)
        if sum(step.writing is writing for step in seen) == at:
            raise Killed

    with pytest.raises(Killed):
        screen([poisoned], str(tmp_path / OUT), MadeScorer, CONFIG, kill)
    if not writing:
        assert not (tmp_path / OUT / "kept").exists()
    with pytest.raises(ReftError, match="no finished screening"):
        kept_rows(str(tmp_path / OUT))
    scorer = SilentScorer if writing or at == UNITS else MadeScorer
    screen([poisoned], str(tmp_path / OUT), scorer, CONFIG)
    assert contents(tmp_path / OUT) == contents(tmp_path / "whole")


def test_lost_files_are_written_again(poisoned, tmp_path):
    out = tmp_path / OUT
    screen([poisoned], str(out), MadeScorer, CONFIG)
    before = contents(out)
    for lost in ("quarantine/part-00000-000002.parquet", ".screen/threshold.json", ".screen/units/00000-000004.json"):
        (out / lost).unlink()
        screen([poisoned], str(out), SilentScorer, CONFIG)
        assert contents(out) == before, lost
    stored = out / ".screen/judged/00000-000003.arrow"
    for damaged in (None, b"", stored.read_bytes()[:-20]):
        stored.unlink() if damaged is None else stored.write_bytes(damaged)
        (out / "kept/part-00000-000003.jsonl").unlink()
        screen([poisoned], str(out), MadeScorer, CONFIG)
        assert contents(out) == before, damaged


@pytest.mark.parametrize(
    "other", [{"job_threshold": False}, {"job_threshold_floor": 0.1}, {"thresholds": Thresholds(0.3, 0.4)}]
)
def test_another_setting_is_refused(poisoned, tmp_path, other):
    screen([poisoned], str(tmp_path / OUT), MadeScorer, CONFIG)
    with pytest.raises(UsageError, match="other settings"):
        screen([poisoned], str(tmp_path / OUT), MadeScorer, replace(CONFIG, **other))


def test_another_teacher_is_refused(poisoned, tmp_path):
    class Other(MadeScorer):
        teacher_id = "rt-other"

    out = tmp_path / OUT
    screen([poisoned], str(out), MadeScorer, CONFIG)
    for lost in (
        [],
        [".screen/units/00000-000003.json"],
        [".screen/judged/00000-000003.arrow", ".screen/threshold.json"],
    ):
        for name in lost:
            (out / name).unlink()
        with pytest.raises(ReftError, match="different teachers"):
            screen([poisoned], str(out), Other, CONFIG)


def test_the_stored_verdicts_hold_no_text(poisoned, tmp_path):
    screen([poisoned], str(tmp_path / OUT), MadeScorer, replace(CONFIG, findings=True))
    stored = [path.read_bytes() for path in (tmp_path / OUT / ".screen").rglob("*") if path.is_file()]
    assert len(stored) == UNITS * 2 + 2
    assert not any(word in content for content in stored for word in (b"question", b"prompt"))


@pytest.mark.parametrize(
    ("combine", "applies"), [(Combine.ANY, True), (Combine.ALL, False), (Combine.GREY_BAND, False)]
)
def test_a_guard_that_may_clear_rows_switches_it_off(poisoned, tmp_path, combine, applies):
    config = replace(CONFIG, guards=lambda: [WordGuard()], guard_combine=combine)
    found = screen([poisoned], str(tmp_path / OUT), MadeScorer, config).job_threshold
    assert (found.own is not None) == applies
    assert applies or f"--guard-combine {combine}" in found.fallback


def test_rows_that_the_teacher_never_scored_do_not_count(tmp_path):
    values = scores((360, TASK), (40, POISON))
    data = Path(written(tmp_path / "rows.jsonl", values))
    data.write_text(data.read_text().replace("question 1", "flagged 1"))
    flagged = data.read_text().count("flagged")
    config = replace(CONFIG, guards=lambda: [WordGuard()], guard_order=Order.BEFORE)
    found = screen([str(data)], str(tmp_path / OUT), MadeScorer, config).job_threshold
    assert 0 < found.scores == sum(found.histogram) == 400 - flagged


def test_threads_and_compressed_files_give_the_same_rows(poisoned, tmp_path):
    packed = tmp_path / "rows.jsonl.gz"
    with pa.CompressedOutputStream(str(packed), "gzip") as stream:
        stream.write(Path(poisoned).read_bytes())
    report = screen([poisoned], str(tmp_path / "a"), MadeScorer, CONFIG)
    threaded = screen([poisoned], str(tmp_path / "b"), MadeScorer, replace(CONFIG, threads=3))
    assert threaded == report
    assert contents(tmp_path / "b") == contents(tmp_path / "a")
    assert screen([str(packed)], str(tmp_path / "c"), MadeScorer, CONFIG).job_threshold == report.job_threshold


def test_large_datasets_are_sampled_by_row_number(poisoned, tmp_path, monkeypatch):
    whole = screen([poisoned], str(tmp_path / "a"), MadeScorer, CONFIG).job_threshold
    monkeypatch.setattr("reft_ray.screening.dataset_threshold.SAMPLED_SCORES", 200)
    found = screen([poisoned], str(tmp_path / "b"), MadeScorer, CONFIG).job_threshold
    assert found.own != whole.own
    assert found.own == pytest.approx(whole.own, abs=0.05)
    assert (found.scores, found.histogram) == (whole.scores, whole.histogram)


def test_the_report_shows_thresholds_and_rows_between(poisoned, tmp_path):
    report = screen([poisoned], str(tmp_path / OUT), MadeScorer, CONFIG)
    page, found = (tmp_path / OUT / "report.html").read_text(), report.job_threshold
    assert page.count("<rect") == 64
    for name, score in (("dataset", found.own), ("review", 0.35), ("block", 0.41)):
        assert f"<title>{name} threshold {score:.3f}</title>" in page
    assert f"{found.rows} rows between" in page
    assert f"{found.rows} rows between" in found.summary


def test_the_metrics_equal_the_report(poisoned, tmp_path):
    recorder = MemoryRecorder()
    report = screen([poisoned], str(tmp_path / OUT), MadeScorer, CONFIG, metrics=ScreeningMetrics(recorder))
    for outcome in ("kept", "review", "blocked", "invalid"):
        assert recorder.total(catalog.SCREENING_ROWS, outcome=outcome) == getattr(report, outcome)
    counted = recorder.total(catalog.FILTER_ROWS, decision="review", reason="job_threshold", stream="dataset")
    assert counted == report.job_threshold.rows
    assert len(recorder.observations(catalog.FILTER_SCORE)) == 400


def test_an_empty_unit_and_a_dataset_of_invalid_rows(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("{broken\n" * 100)
    with pytest.raises(ReftError, match="no row is left"):
        screen([str(data)], str(tmp_path / OUT), MadeScorer, CONFIG)
    assert load_report(str(tmp_path / OUT)).job_threshold.fallback == str(Fallback.FEW_ROWS)


def test_an_input_that_changed_between_the_passes_is_refused(poisoned, tmp_path):
    def change(progress):
        if not progress.writing and progress.done == progress.total:
            lines = Path(poisoned).read_bytes().split(b"\n")
            lines[0] = b"{" + b"x" * (len(lines[0]) - 1)
            Path(poisoned).write_bytes(b"\n".join(lines))

    with pytest.raises(ReftError, match="input changed after it was judged"):
        screen([poisoned], str(tmp_path / OUT), MadeScorer, CONFIG, change)


SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
from dataclasses import replace
from test_job_threshold_screening import CONFIG, MadeScorer
from reft_ray.screening.dataset import screen
screen([sys.argv[1]], sys.argv[2], MadeScorer, CONFIG, lambda step: print(step.writing, flush=True) or time.sleep(0.05))
"""


@pytest.mark.parametrize("lines", [3, UNITS + 2])
def test_a_process_killed_in_either_pass_resumes_exactly(poisoned, tmp_path, lines):
    screen([poisoned], str(tmp_path / "whole"), MadeScorer, CONFIG)
    script = SCRIPT.format(tests=str(Path(__file__).parent))
    command = [sys.executable, "-c", script, poisoned, str(tmp_path / OUT)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as driver:
        for _ in range(lines):
            last = driver.stdout.readline()
        driver.send_signal(signal.SIGKILL)
    assert last.strip() == (b"True" if lines > UNITS else b"False")
    screen([poisoned], str(tmp_path / OUT), MadeScorer, CONFIG)
    resumed = {name: content for name, content in contents(tmp_path / OUT).items() if not name.endswith(".tmp")}
    assert resumed == contents(tmp_path / "whole")


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_on_ray_the_output_is_the_same(poisoned, tmp_path):
    progress = []
    config = replace(CONFIG, small_rows=0, actors=2, cpus_per_actor=0.5)
    report = screen([poisoned], str(tmp_path / OUT), MadeScorer, config, progress.append)
    assert report.job_threshold.own is not None
    assert [step.writing for step in progress] == [False] * UNITS + [True] * UNITS
    screen([poisoned], str(tmp_path / "whole"), MadeScorer, CONFIG)
    assert contents(tmp_path / OUT) == contents(tmp_path / "whole")
