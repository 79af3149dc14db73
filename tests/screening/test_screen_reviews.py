"""Human review: decisions are recorded, approved rows are kept with their origin, overturns are counted."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reft_ray.core.errors import BlockedByPolicyError, UsageError
from reft_ray.screening.config import Policy, ScreenConfig
from reft_ray.screening.dataset import screen
from reft_ray.screening.kept_rows import kept_count, kept_rows
from reft_ray.screening.ranges import Limits
from reft_ray.screening.reviews import Action, Reviews, Summary
from reft_ray.testbed.word_scorer import WordScorer

CONFIG = ScreenConfig(limits=Limits(rows=16))


@pytest.fixture
def out(dataset, tmp_path):
    screen([str(dataset)], str(tmp_path / "out"), WordScorer, CONFIG)
    return str(tmp_path / "out")


def test_decisions_are_recorded_with_reviewer_reason_and_time(out, tmp_path):
    Reviews(out).decide([10, 15], Action.APPROVE, "ada", "counter-speech")
    Reviews(out).decide([20], Action.REJECT, "ada", "harmful")
    Reviews(out).decide([15], Action.REJECT, "bob", "second look")
    log = [json.loads(line) for line in (tmp_path / "out" / "reviews.jsonl").read_text().splitlines()]
    assert [(entry["row_number"], entry["action"], entry["reviewer"]) for entry in log] == [
        (10, "approve", "ada"),
        (15, "approve", "ada"),
        (20, "reject", "ada"),
        (15, "reject", "bob"),
    ]
    assert all(entry["reason"] and entry["time"].endswith("+00:00") and entry["id"] for entry in log)
    assert Reviews(out).summary() == Summary(withheld=26, pending=23, approved=1, rejected=2, overturn_rate=1 / 3)


def test_approved_rows_join_the_kept_ones_in_order(out, dataset, tmp_path):
    before = [number for number, _ in kept_rows(out)]
    Reviews(out).decide([10, 15, 200], Action.APPROVE, "ada", "fine")
    after = dict(kept_rows(out))
    assert list(after) == sorted([*before, 10, 15, 200])
    assert "bomb" in after[10][0].content
    assert kept_count(out) == len(before) + 3
    lines = dataset.read_bytes().splitlines(keepends=True)
    parts = {path.name: path.read_bytes() for path in (tmp_path / "out" / "kept").glob("approved-*")}
    assert parts == {
        "approved-00000-000000.jsonl": lines[9] + lines[14],
        "approved-00000-000012.jsonl": lines[199],
    }
    origin = [json.loads(line) for line in (tmp_path / "out" / "approved.jsonl").read_text().splitlines()]
    assert [(entry["row_number"], entry["teacher"], entry["review"]["reviewer"]) for entry in origin] == [
        (10, "rt-words", "ada"),
        (15, "rt-words", "ada"),
        (200, "rt-words", "ada"),
    ]
    Reviews(out).decide([200], Action.REJECT, "bob", "no")
    assert not (tmp_path / "out" / "kept" / "approved-00000-000012.jsonl").exists()
    assert 200 not in dict(kept_rows(out))


def test_a_second_screening_run_keeps_the_reviews(out, dataset):
    Reviews(out).decide([10], Action.APPROVE, "ada", "fine")
    screen([str(dataset)], out, WordScorer, CONFIG)
    assert 10 in dict(kept_rows(out))


def test_the_review_policy_waits_for_the_last_row(dataset, tmp_path):
    out = str(tmp_path / "out")
    with pytest.raises(BlockedByPolicyError, match="26 withheld rows wait"):
        screen([str(dataset)], out, WordScorer, ScreenConfig(policy=Policy.REVIEW))
    pending = [item["row_number"] for item in Reviews(out).items(decided=False)]
    Reviews(out).decide(pending[:-1], Action.REJECT, "ada", "harmful")
    with pytest.raises(BlockedByPolicyError, match="1 withheld rows wait"):
        kept_rows(out)
    Reviews(out).decide(pending[-1:], Action.APPROVE, "ada", "fine")
    assert len(list(kept_rows(out))) == 175
    report = screen([str(dataset)], out, WordScorer, ScreenConfig(policy=Policy.REVIEW))
    assert report.status_reason == "175 of 210 rows may be trained on"


def test_approvals_count_towards_the_reject_ratio(dataset, tmp_path):
    out = str(tmp_path / "out")
    with pytest.raises(BlockedByPolicyError, match=r"26 of 200 valid rows \(13.0%\) are withheld"):
        screen([str(dataset)], out, WordScorer, ScreenConfig(max_reject_ratio=0.12))
    Reviews(out).decide([10, 15], Action.APPROVE, "ada", "fine")
    assert len(list(kept_rows(out))) == 176


def test_only_single_items_have_text(out):
    items = list(Reviews(out).items())
    assert [item["row_number"] for item in items][:3] == [10, 15, 20]
    assert "bomb" not in json.dumps(items)
    assert "bomb" in Reviews(out).item(10)["messages"][0]["content"]
    Reviews(out).decide([10], Action.REJECT, "ada", "harmful")
    assert len(list(Reviews(out).items(decided=False))) == 25
    assert [item["review"]["action"] for item in Reviews(out).items(decided=True)] == ["reject"]


def test_decided_rows_are_exported_with_labels(out):
    Reviews(out).decide([15], Action.APPROVE, "ada", "fine")
    Reviews(out).decide([10], Action.REJECT, "ada", "harmful")
    assert [(row["row_number"], row["label"]) for row in Reviews(out).export()] == [(10, "harmful"), (15, "harmless")]


def test_approved_columnar_rows_have_their_types(tmp_path):
    table = pa.table({"prompt": ["tea", "bomb"], "response": ["a", "b"], "n": pa.array([1, 2], "int8")})
    pq.write_table(table, tmp_path / "rows.parquet")
    out = tmp_path / "out"
    screen([str(tmp_path / "rows.parquet")], str(out), WordScorer)
    Reviews(str(out)).decide([2], Action.APPROVE, "ada", "a test")
    assert pq.read_table(out / "kept" / "approved-00000-000000.parquet").equals(table.slice(1))


@pytest.mark.parametrize(
    ("rows", "reviewer", "reason", "message"),
    [
        ([1], "ada", "x", "row 1 is not in the quarantine"),
        ([10, 999], "ada", "x", "there is no row 999"),
        ([10], " ", "x", "needs a reviewer"),
        ([10], "ada", "", "needs a reviewer and a reason"),
    ],
)
def test_wrong_decisions_record_nothing(out, tmp_path, rows, reviewer, reason, message):
    with pytest.raises(UsageError, match=message):
        Reviews(out).decide(rows, Action.APPROVE, reviewer, reason)
    assert not (tmp_path / "out" / "reviews.jsonl").exists()
