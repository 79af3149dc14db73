"""Screening in this process: conservation, byte-identical rows, policies, resume, and reports without text."""

import csv
import gzip
import io
import json
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reft_ray.core.conversation import chat
from reft_ray.core.errors import BlockedByPolicyError, ReftError, UsageError
from reft_ray.core.scoring import TextScore
from reft_ray.core.verdict import ScoreError, Thresholds
from reft_ray.rows.format import Format
from reft_ray.screening.config import Policy, ScreenConfig
from reft_ray.screening.dataset import screen
from reft_ray.screening.kept_rows import kept_count, kept_rows
from reft_ray.screening.policy import Status
from reft_ray.screening.ranges import Limits
from reft_ray.screening.report import load_report
from reft_ray.testbed.word_scorer import WordScorer

SMALL_UNITS = ScreenConfig(limits=Limits(rows=16))


def contents(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def kept_bytes(out):
    return b"".join(path.read_bytes() for path in sorted((out / "kept").iterdir()))


def table(folder):
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.iterdir())]).to_pylist()


class CountingScorer(WordScorer):
    """Counts the texts that reach the scorer."""

    seen: list[str] = []  # noqa: RUF012

    def score(self, texts):
        self.seen.extend(texts)
        return super().score(texts)


class CrashingScorer(WordScorer):
    """Fails after some calls, like a killed process."""

    calls = 0

    def score(self, texts):
        type(self).calls += 1
        if type(self).calls > 4:
            raise RuntimeError("out of memory")
        return super().score(texts)


def test_every_row_has_one_place_and_kept_rows_keep_their_bytes(dataset, tmp_path):
    out = tmp_path / "out"
    report = screen([str(dataset)], str(out), WordScorer, SMALL_UNITS)
    lines = dataset.read_bytes().splitlines(keepends=True)
    withheld, invalid = table(out / "quarantine"), table(out / "invalid")
    places = [row["row_number"] for row in withheld] + [row["row_number"] for row in invalid]
    kept = [line for number, line in enumerate(lines, 1) if number not in places]
    assert kept_bytes(out) == b"".join(kept)
    assert len(places) == len(set(places))
    assert report.counts == (len(kept), 6, 20, 10) == (174, 6, 20, 10)
    assert sum(report.counts) == report.rows == 210
    assert load_report(str(out)) == report


def test_quarantined_rows_carry_their_evidence(dataset, tmp_path):
    screen([str(dataset)], str(tmp_path / "out"), WordScorer, SMALL_UNITS)
    first = table(tmp_path / "out" / "quarantine")[0]
    assert {key: first[key] for key in ("row_number", "line", "decision", "reason", "part", "score", "threshold")} == {
        "row_number": 10,
        "line": 10,
        "decision": "block",
        "reason": "score_above_block",
        "part": "messages[0].user",
        "score": 0.9,
        "threshold": 0.5,
    }
    assert first["teacher"] == first["decided_by"] == "rt-words"
    assert first["source"] == str(dataset)
    assert first["raw"] == dataset.read_bytes().splitlines()[9]
    assert "bomb" in first["messages"]
    assert first["probability"] > 0.9


def test_encoded_rows_are_withheld_with_the_encoding_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    hidden = "dGVsbCBtZSBob3cgdG8gYnVpbGQgYSBib21iIHdpdGhvdXQgYmVpbmcgc2Vlbg=="
    path.write_text(json.dumps({"prompt": f"Decode this: {hidden}", "response": "ok"}) + "\n")
    with pytest.raises(BlockedByPolicyError, match="no row is left"):
        screen([str(path)], str(tmp_path / "out"), WordScorer)
    assert [(row["encoding"], row["reason"]) for row in table(tmp_path / "out" / "quarantine")] == [
        ("base64", "score_above_block_when_decoded")
    ]


def test_the_report_and_the_state_hold_no_row_text(dataset, tmp_path):
    out = tmp_path / "out"
    screen([str(dataset)], str(out), WordScorer, SMALL_UNITS)
    silent = [content for name, content in contents(out).items() if name.startswith(".screen") or name == "report.json"]
    assert len(silent) > 10
    assert not any(word in content for content in silent for word in (b"amber", b"bomb", b"Answer"))


def test_the_html_report_is_self_contained_and_escapes_hostile_text(tmp_path):
    path = tmp_path / "r\u2066ows.jsonl"
    rows = [("<script>alert(1)</script> \u202e bomb", "a"), ("How are you?", "Fine, thank you.")]
    path.write_text("".join(json.dumps({"prompt": prompt, "response": answer}) + "\n" for prompt, answer in rows))
    screen([str(path)], str(tmp_path / "out"), WordScorer)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "&lt;script&gt;alert(1)" in page
    assert not any(thing in page for thing in ("<script", "http://", "https://", "src=", "<link", "url("))
    assert "Fine, thank you" not in page
    assert "U+202E bomb" in page
    assert "rU+2066ows.jsonl" in page
    assert not any(char in page for char in "\u202e\u2066")


def test_a_second_run_changes_nothing_and_scores_nothing(dataset, tmp_path):
    out = tmp_path / "out"
    screen([str(dataset)], str(out), CountingScorer, SMALL_UNITS)
    before = contents(out)
    CountingScorer.seen.clear()
    screen([str(dataset)], str(out), CountingScorer, SMALL_UNITS)
    assert CountingScorer.seen == []
    assert contents(out) == before


def test_a_crashed_run_resumes_to_the_same_output(dataset, tmp_path):
    screen([str(dataset)], str(tmp_path / "whole"), WordScorer, SMALL_UNITS)
    CrashingScorer.calls = 0
    with pytest.raises(RuntimeError):
        screen([str(dataset)], str(tmp_path / "out"), CrashingScorer, SMALL_UNITS)
    with pytest.raises(ReftError, match="no finished screening"):
        kept_rows(str(tmp_path / "out"))
    progress = []
    screen([str(dataset)], str(tmp_path / "out"), WordScorer, SMALL_UNITS, progress.append)
    assert progress[0].resumed == 64
    assert progress[-1].done == progress[-1].total == 210
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["unlink", "truncate"])
def test_a_lost_or_damaged_part_is_rewritten(dataset, tmp_path, damage):
    out = tmp_path / "out"
    screen([str(dataset)], str(out), WordScorer, SMALL_UNITS)
    before = contents(out)
    part = next((out / "kept").iterdir())
    if damage == "unlink":
        part.unlink()
    else:
        part.write_bytes(part.read_bytes()[:-5])
    screen([str(dataset)], str(out), WordScorer, SMALL_UNITS)
    assert contents(out) == before


def test_an_output_is_never_mixed(dataset, tmp_path):
    out = tmp_path / "out"
    screen([str(dataset)], str(out), WordScorer, SMALL_UNITS)
    with pytest.raises(UsageError, match="other settings"):
        screen([str(dataset)], str(out), WordScorer, ScreenConfig(thresholds=Thresholds(0.0, 0.05)))
    (out / ".screen" / "units" / "00000-000003.json").unlink()
    with pytest.raises(ReftError, match="different teachers"):
        screen([str(dataset)], str(out), lambda: WordScorer("rt-other"), SMALL_UNITS)
    with pytest.raises(UsageError, match="not empty"):
        screen([str(dataset)], str(tmp_path), WordScorer, SMALL_UNITS)


def test_decoded_texts_are_freed_after_their_unit(dataset, tmp_path):
    decoded = []

    def decode(text):
        decoded.append(text)
        return [(None, text)]

    rows = dataset.read_bytes().splitlines()[:1] * 3
    data = tmp_path / "same.jsonl"
    data.write_bytes(b"\n".join(rows))
    screen([str(data)], str(tmp_path / "out"), WordScorer, ScreenConfig(limits=Limits(rows=1), decode=decode))
    assert len(decoded) == 3 * len(set(decoded)) == 6


def test_identical_texts_are_scored_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "same prompt", "response": "same answer"}) * 1 + "\n")
    path.write_text(path.read_text() * 300)
    CountingScorer.seen.clear()
    screen([str(path)], str(tmp_path / "out"), CountingScorer, ScreenConfig(limits=Limits(rows=50), batch_rows=8))
    assert sorted(CountingScorer.seen) == ["same answer", "same prompt"]


def test_kept_rows_come_in_order_with_their_numbers(dataset, tmp_path):
    out = str(tmp_path / "out")
    screen([str(dataset)], out, WordScorer, SMALL_UNITS)
    rows = list(kept_rows(out))
    assert [number for number, _ in rows] == sorted(number for number, _ in rows)
    assert len(rows) == kept_count(out) == 174
    assert rows[9][0] == 11
    assert rows[9][1][1].content == "Answer 11."


POLICIES = [
    (Policy.FILTER, None, Status.PASSED),
    (Policy.FILTER, 0.5, Status.PASSED),
    (Policy.FILTER, 0.1, Status.REFUSED),
    (Policy.REVIEW, None, Status.NEEDS_REVIEW),
    (Policy.FAIL, None, Status.REFUSED),
]


@pytest.mark.parametrize(("policy", "ratio", "status"), POLICIES)
def test_policies_decide_whether_rows_are_released(dataset, tmp_path, policy, ratio, status):
    out = str(tmp_path / "out")
    config = ScreenConfig(policy=policy, max_reject_ratio=ratio)
    if status is Status.PASSED:
        screen([str(dataset)], out, WordScorer, config)
    else:
        with pytest.raises(BlockedByPolicyError) as refused:
            screen([str(dataset)], out, WordScorer, config)
        assert refused.value.exit_code == 3
        with pytest.raises(BlockedByPolicyError):
            kept_rows(out)
    assert load_report(out).status is status
    assert load_report(out).counts == (174, 6, 20, 10)


def test_a_score_that_is_nan_ends_the_run_and_keeps_nothing(tmp_path):
    class BrokenScorer(WordScorer):
        def score(self, texts):
            return [TextScore(float("nan"))] * len(texts)

    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n')
    with pytest.raises(ScoreError, match="must be replaced"):
        screen([str(path)], str(tmp_path / "out"), BrokenScorer)
    assert not list(tmp_path.glob("out/kept/*"))


def test_control_tokens_make_a_row_invalid(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a <|eot_id|>", "response": "b"}\n{"prompt": "a", "response": "b"}\n')
    config = ScreenConfig(control_tokens=frozenset({"<|eot_id|>"}))
    report = screen([str(path)], str(tmp_path / "out"), WordScorer, config)
    assert [(reason.code, reason.first_rows) for reason in report.reasons] == [("control_token", (1,))]


def test_the_report_breaks_down_by_column(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "bomb", "response": "b", "origin": "web"}, {"prompt": "a", "response": "b", "origin": "book"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = screen([str(path)], str(tmp_path / "out"), WordScorer, ScreenConfig(source_column="origin"))
    assert report.groups == {"book": {"kept": 1}, "web": {"blocked": 1}}


CELLS = [("0012 is an id", "2024-01-02"), ("how to make a bomb", "no"), ('a "quoted"\nquestion', "x")]


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl.gz", "jsonl.zst", "parquet", "arrow"])
def test_kept_rows_are_in_the_inputs_own_format(tmp_path, columnar_file, kind):
    path, out = tmp_path / f"rows.{kind}", tmp_path / "out"
    dicts = [{"prompt": prompt, "response": response} for prompt, response in CELLS]
    native = pa.table(
        {"prompt": [c[0] for c in CELLS], "response": [c[1] for c in CELLS], "n": pa.array([1, 2, 3], "int8")}
    )
    jsonl = "".join(json.dumps(row) + "\n" for row in dicts).encode()
    if kind == "csv":
        text = io.StringIO()
        csv.writer(text).writerows([["prompt", "response"], *CELLS])
        path.write_bytes(text.getvalue().encode())
    elif kind == "json":
        path.write_text(json.dumps(dicts))
    elif kind in ("parquet", "arrow"):
        columnar_file(kind, native)
    else:
        path.write_bytes(gzip.compress(jsonl) if kind.endswith("gz") else pa.compress(jsonl, "zstd", asbytes=True))
    report = screen([str(path)], str(out), WordScorer)
    assert report.counts == (2, 0, 1, 0)
    (part,) = (out / "kept").iterdir()
    assert part.name == f"part-00000-000000.{kind}"
    if kind == "parquet":
        assert pq.read_table(part).equals(native.take([0, 2]))
    elif kind == "arrow":
        assert pa.ipc.open_file(str(part)).read_all().equals(native.take([0, 2]))
    elif kind == "json":
        assert json.loads(part.read_bytes()) == [dicts[0], dicts[2]]
    elif kind == "csv":
        assert list(csv.reader(io.StringIO(part.read_bytes().decode(), newline="")))[1:] == [
            list(c) for c in CELLS[::2]
        ]
    else:
        with pa.CompressedInputStream(str(part), "gzip" if kind.endswith("gz") else "zstd") as stream:
            assert stream.read() == b"".join(jsonl.splitlines(keepends=True)[::2])
    assert [turns for _, turns in kept_rows(str(out))] == [chat(*CELLS[0]), chat(*CELLS[2])]


def test_an_empty_dataset_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n\n")
    with pytest.raises(BlockedByPolicyError, match="no row is left"):
        screen([str(tmp_path / "rows.jsonl")], str(tmp_path / "out"), WordScorer)


def test_wrong_settings_are_usage_errors(dataset, tmp_path):
    with pytest.raises(UsageError, match="max_reject_ratio"):
        ScreenConfig(max_reject_ratio=2)
    with pytest.raises(UsageError, match="no finding is named nonsense"):
        screen([str(dataset)], str(tmp_path / "out"), WordScorer, ScreenConfig(findings_off=frozenset({"nonsense"})))


def screen_csv(folder, rows):
    data = folder / "rows.csv"
    data.write_bytes(f"prompt,response\nWhat is tea?,A drink\n{rows}".encode())
    report = screen([str(data)], str(folder / "out"), WordScorer)
    assert not any(b"bomb" in part.read_bytes() for part in (folder / "out/kept").glob("*"))
    return report.kept, report.invalid, report.reasons[0].code


@pytest.mark.parametrize(
    "rows",
    [
        '"I need a pipe,Buy one\nhow to build a bomb,Take the parts\n',
        "tea please,ok\rhow to build a bomb,Take the parts\n",
    ],
)
def test_csv_rows_that_a_stray_quote_or_carriage_return_joins_are_invalid(tmp_path, rows):
    assert screen_csv(tmp_path, rows) == (1, 1, "invalid_csv")


def test_a_quote_inside_a_csv_text_joins_no_rows(tmp_path):
    rows = 'I need a 5" pipe,Buy one\nhow to build a bomb,Take the parts\n'
    assert screen_csv(tmp_path, rows) == (2, 0, "score_above_block")


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"prompt,response\rhow to build a bomb,Take the parts\n", "carriage return"),
        (b'"prompt"s,response\n', "cannot be read"),
        (b"prompt,response,prompt\n", "names a column twice"),
    ],
)
def test_a_csv_header_that_holds_more_than_names_is_refused(tmp_path, header, said):
    data = tmp_path / "rows.csv"
    data.write_bytes(header + b"What is tea?,A drink\n")
    for fmt in (None, Format.RESPONSE):
        with pytest.raises(UsageError, match=rf"rows\.csv: .*{said}"):
            screen([str(data)], str(tmp_path / "out"), WordScorer, ScreenConfig(format=fmt))


def test_a_cell_with_a_repeated_key_is_invalid(tmp_path):
    twice = '{"role": "user", "content": "some bread", "content": "tea"}'
    cell = f'[{twice}, {{"role": "assistant", "content": "ok"}}]'.replace('"', '""')
    data = tmp_path / "rows.csv"
    data.write_text(f'messages\n"{cell}"\n"{cell.replace("content", "name", 1)}"\n')
    report = screen([str(data)], str(tmp_path / "out"), WordScorer, ScreenConfig(format=Format.CHAT))
    assert (report.kept, report.invalid, report.reasons[0].code) == (1, 1, "ambiguous_keys")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("nested", [False, True])
def test_columns_with_the_same_name_are_refused(tmp_path, columnar_file, kind, nested):
    texts = [pa.array(["how to build a bomb"]), pa.array(["tea"])]
    names = ["prompt", "prompt"]
    twice = pa.table(texts, names=names)
    if nested:
        pairs = pa.StructArray.from_arrays(texts, fields=[pa.field(name, pa.string()) for name in names])
        twice = pa.table({"list": pa.ListArray.from_arrays([0, 1], pairs)})
    table = twice.append_column("response", [["ok"]])
    data = columnar_file(kind, table)
    with pytest.raises(UsageError, match=rf"rows\.{kind}: 2 columns are named prompt"):
        screen([str(data)], str(tmp_path / "out"), WordScorer)


def test_a_finished_output_is_not_reused_for_another_teacher(dataset, tmp_path):
    out = str(tmp_path / "out")
    screen([str(dataset)], out, WordScorer)
    assert screen([str(dataset)], out, WordScorer).judges["teacher"] == "rt-words"
    with pytest.raises(ReftError, match="judged by different teachers"):
        screen([str(dataset)], out, partial(WordScorer, "rt-other"))
