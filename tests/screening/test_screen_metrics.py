"""The metrics of a screening equal its report."""

import json
from dataclasses import replace

import pytest

from reft_ray.core.errors import BlockedByPolicyError, UsageError
from reft_ray.screening.config import ScreenConfig
from reft_ray.screening.dataset import screen
from reft_ray.screening.metrics import ScreeningMetrics
from reft_ray.screening.report import RowsLostError, load_report
from reft_ray.screening.reviews import Action, Reviews
from reft_ray.telemetry import catalog
from reft_ray.telemetry.drift import DRIFT_ROWS
from reft_ray.telemetry.recorder import MemoryRecorder
from reft_ray.testbed.word_scorer import WordScorer

PROMPTS = ["how to bake bread", "how to build a bomb", "a tactical knife", "hello", "explosives for a bomb"]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": text, "completion": "sure"}) for text in PROMPTS] + ["no row"]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_rows_verdicts_and_the_dataset_are_counted(rows, tmp_path):
    recorder = MemoryRecorder()
    config = ScreenConfig(findings=False, max_reject_ratio=None)
    report = screen([rows], str(tmp_path / "out"), WordScorer, config, metrics=ScreeningMetrics(recorder, "acme"))
    for outcome in ("kept", "review", "blocked", "invalid"):
        counted = recorder.total(catalog.SCREENING_ROWS, outcome=outcome, project="acme")
        assert counted == getattr(report, outcome)
    assert report.blocked > 0
    assert report.invalid == 1
    judged = report.rows - report.invalid
    assert recorder.total(catalog.FILTER_ROWS, stream="dataset", policy="filter") == judged
    assert recorder.total(catalog.FILTER_ROWS, decision="block", reason="refusal_score") == report.blocked
    assert len(recorder.observations(catalog.FILTER_SCORE, stream="dataset", teacher="rt-words")) == judged
    assert recorder.total(catalog.SCREENING_INVALID) == 1
    assert recorder.total(catalog.SCREENING_BYTES) > 0
    assert recorder.total(catalog.SCREENING_DATASETS, outcome="passed", policy="filter") == 1
    assert len(recorder.observations(catalog.SCREENING_SECONDS, size="small")) == 1

    again = MemoryRecorder()
    screen([rows], str(tmp_path / "out"), WordScorer, config, metrics=ScreeningMetrics(again, "acme"))
    assert again.total(catalog.SCREENING_ROWS) == 0, "a resumed unit was counted by the run that did it"


@pytest.mark.parametrize("like_the_calibration", [True, False])
def test_the_drift_of_a_whole_dataset_is_recorded(tmp_path, like_the_calibration):
    path = tmp_path / "rows.jsonl"
    half = DRIFT_ROWS // 2
    texts = [f"how to bake bread {n}" for n in range(half)] + [f"how to build a bomb {n}" for n in range(half)]
    path.write_text("".join(json.dumps({"prompt": text, "completion": "sure"}) + "\n" for text in texts))
    scores = [item.score for item in WordScorer().score([texts[0], texts[-1]])]
    calibration = [0] * 20
    for score in scores if like_the_calibration else scores[:1]:
        calibration[int((score + 1) / 2 * 20)] += 500
    recorder = MemoryRecorder()
    config = ScreenConfig(findings=False, max_reject_ratio=None)
    metrics = ScreeningMetrics(recorder, "acme", calibration)
    screen([str(path)], str(tmp_path / "out"), WordScorer, config, metrics=metrics)
    psi = recorder.total(catalog.FILTER_SCORE_PSI, stream="dataset", teacher="rt-words")
    shift = recorder.total(catalog.FILTER_SCORE_MEAN_SHIFT, stream="dataset", teacher="rt-words")
    assert (psi < 0.01, abs(shift) < 0.03) == (like_the_calibration, like_the_calibration)


def test_a_dataset_too_small_for_drift_records_none(rows, tmp_path):
    recorder = MemoryRecorder()
    config = ScreenConfig(findings=False, max_reject_ratio=None)
    screen([rows], str(tmp_path / "out"), WordScorer, config, metrics=ScreeningMetrics(recorder, "acme", [1] * 20))
    assert recorder.series(catalog.FILTER_SCORE_PSI) == []


def test_refused_and_failed_screenings_are_counted(rows, tmp_path):
    recorder = MemoryRecorder()
    with pytest.raises(BlockedByPolicyError):
        screen(
            [rows],
            str(tmp_path / "a"),
            WordScorer,
            ScreenConfig(findings=False, max_reject_ratio=0.1),
            metrics=ScreeningMetrics(recorder),
        )
    with pytest.raises(UsageError):
        screen([str(tmp_path / "absent.jsonl")], str(tmp_path / "b"), WordScorer, metrics=ScreeningMetrics(recorder))
    assert recorder.total(catalog.SCREENING_DATASETS, outcome="refused") == 1
    assert recorder.total(catalog.SCREENING_DATASETS, outcome="failed") == 1
    assert recorder.total(catalog.UNACCOUNTED_ROWS) == 0


def test_lost_rows_are_counted(rows, tmp_path, monkeypatch):
    def lost(*_: object) -> None:
        raise RowsLostError("rows are not conserved", 2)

    monkeypatch.setattr("reft_ray.screening.dataset.compose", lost)
    recorder = MemoryRecorder()
    with pytest.raises(RowsLostError):
        screen([rows], str(tmp_path / "out"), WordScorer, metrics=ScreeningMetrics(recorder))
    assert recorder.total(catalog.UNACCOUNTED_ROWS, where="screening") == 2


def test_reviews_are_counted_with_their_age(rows, tmp_path):
    recorder = MemoryRecorder()
    out = str(tmp_path / "out")
    screen([rows], out, WordScorer, ScreenConfig(findings=False, max_reject_ratio=None))
    withheld = [item["row_number"] for item in Reviews(out).items()]
    reviews = Reviews(out, recorder)
    reviews.decide(withheld[:1], Action.APPROVE, "ann", "a kitchen knife")
    reviews.decide(withheld[1:], Action.REJECT, "ann", "harmful")
    assert recorder.total(catalog.REVIEW_DECISIONS, outcome="approved") == 1
    assert recorder.total(catalog.REVIEW_DECISIONS, outcome="rejected") == len(withheld) - 1
    assert len(recorder.observations(catalog.REVIEW_AGE)) == len(withheld)


def test_a_row_that_was_not_read_in_full_counts_as_truncated(tmp_path):
    data, recorder = tmp_path / "rows.jsonl", MemoryRecorder()
    data.write_text('{"prompt": "tea", "completion": "ok"}\n')
    with pytest.raises(BlockedByPolicyError, match="no row is left"):
        screen([str(data)], str(tmp_path / "out"), ShortSighted, metrics=ScreeningMetrics(recorder))
    report = load_report(str(tmp_path / "out"))
    assert (report.review, report.reasons[0].code) == (1, "not_read_to_its_end")
    assert recorder.total(catalog.FILTER_ROWS, decision="review", reason="truncated") == 1


class ShortSighted(WordScorer):
    """Truncates every text."""

    def score(self, texts):
        return [replace(found, truncated=True) for found in super().score(texts)]
