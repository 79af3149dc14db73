"""`reft-ray screen --url`: the same output directory as with a teacher at hand, judged by a service."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from reft_ray.cli.main import app
from reft_ray.core.conversation import chat
from reft_ray.core.errors import ReftError
from reft_ray.core.verdict import Decision, Thresholds
from reft_ray.rows.text import conversation_from
from reft_ray.screening.config import ScreenConfig
from reft_ray.screening.dataset import screen
from reft_ray.screening.outputs import Output
from reft_ray.screening.ranges import Limits
from reft_ray.screening.remote import RemoteTeacher
from reft_ray.testbed.word_scorer import WordScorer

CALL = {
    "role": "assistant",
    "tool_calls": [{"id": "c", "function": {"name": "run", "arguments": '{"what": "a bomb"}'}}],
}


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """90 chat rows: some to keep, some to withhold in each way, some that are invalid."""
    turns = [
        [{"role": "user", "content": f"{word} {index}"}, {"role": "assistant", "content": f"Answer {index}"}]
        for index, word in enumerate(["Good morning", "A bomb", "A tactical knife", "Ym9tYg== is base64"] * 20)
    ]
    turns += [[{"role": "user", "content": f"call {index}"}, CALL] for index in range(5)]
    lines = [json.dumps({"messages": messages}) for messages in turns] + ["{broken"] * 5
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["screen", *map(str, arguments)])


def test_the_output_is_that_of_a_teacher_at_hand(
    make_filter: Callable[..., Any], live: Any, dataset: Path, tmp_path: Path
) -> None:
    service = make_filter()
    with live(service.app) as url:
        result = run(dataset, "--url", url, "--out", tmp_path / "remote", "--json")
        assert result.exit_code == 0, result.output
        again = run(dataset, "--url", url, "--out", tmp_path / "remote", "--json")
    local = screen([str(dataset)], str(tmp_path / "local"), WordScorer)
    report = json.loads(result.stdout)
    assert again.stdout == result.stdout
    assert {name: report[name] for name in ("rows", "kept", "review", "blocked", "invalid")} == {
        "rows": 90, "kept": local.kept, "review": local.review, "blocked": local.blocked, "invalid": 5,
    }  # fmt: skip
    one, other = Output(str(tmp_path / "remote")), Output(str(tmp_path / "local"))
    kept = "kept/part-00000-000000.jsonl"
    assert one.read(kept) == other.read(kept)
    quarantine = "quarantine/part-00000-000000.parquet"
    found, known = one.table(quarantine).to_pylist(), other.table(quarantine).to_pylist()
    assert [row["part"] for row in found if "call" in row["part"]] == ["messages[1].assistant.tool_calls[0]"] * 5
    for row, expected in zip(found, known, strict=True):
        for name, value in expected.items():
            assert row[name] == (pytest.approx(value, abs=1e-5) if isinstance(value, float) else value), name


def test_units_in_flight_are_bounded_and_all_come_back(
    make_filter: Callable[..., Any], live: Any, dataset: Path, tmp_path: Path
) -> None:
    service = make_filter()
    with live(service.app) as url:
        config = ScreenConfig(threads=2, limits=Limits(rows=7), batch_rows=7)
        report = screen([str(dataset)], str(tmp_path / "out"), lambda: RemoteTeacher(url), config)
    assert report.rows == 90
    assert len(list((tmp_path / "out" / ".screen" / "units").iterdir())) == 13
    assert service.judge.most_waiting <= 4


def test_thresholds_travel_and_the_operators_bounds_hold(
    make_filter: Callable[..., Any], live: Any, dataset: Path, tmp_path: Path
) -> None:
    with live(make_filter().app) as url:
        strict = ("--review-threshold", -0.99, "--block-threshold", 0.0)
        result = run(dataset, "--url", url, "--out", tmp_path / "strict", *strict, "--json")
        lax = run(dataset, "--url", url, "--out", tmp_path / "lax", "--review-threshold", 0.9, "--block-threshold", 1)
    assert json.loads(result.stdout)["judges"]["thresholds"] == {"review": -0.99, "block": 0.0}
    assert lax.exit_code == 1
    assert "operator's bounds" in lax.stderr
    assert lax.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name one scorer"),
        (["--url", "http://127.0.0.1:9", "--teacher", "x"], "name one scorer"),
        (["--url", "http://127.0.0.1:9", "--base", "x"], "--base needs --teacher"),
    ],
)
def test_one_judge_is_named(dataset: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = run(dataset, "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_what_the_service_cannot_read_is_withheld_by_name(
    make_filter: Callable[..., Any], live: Any, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": text, "completion": "y"} for text in ("x" * (1 << 20), "tea")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with live(make_filter().app) as url:
        report = screen([str(path)], str(tmp_path / "out"), lambda: RemoteTeacher(url), ScreenConfig(threads=1))
    assert (report.blocked, [reason.code for reason in report.reasons]) == (1, ["not_judged"])


def test_a_service_that_changes_its_teacher_ends_the_run(make_filter: Callable[..., Any], live: Any) -> None:
    service = make_filter()
    with live(service.app) as url:
        teacher = RemoteTeacher(url)
        assert teacher.judge([chat("A bomb")], None)[0].decision is Decision.BLOCK
        assert teacher.judge([chat("Good morning")], Thresholds(-1.0, -1.0))[0].threshold == -1.0
        service.judge.teacher_id = "rt-2"
        with pytest.raises(ReftError, match="changed its teacher from rt-words to rt-2"):
            teacher.judge([conversation_from([{"role": "user", "content": "A bomb"}])], None)


def test_an_error_of_the_network_ends_the_run_in_one_line(tmp_path: Path, dataset: Path) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        return httpx.Response(401, json={"error": {"message": "no such key"}})

    with pytest.raises(ReftError, match="401: no such key"):
        screen(
            [str(dataset)],
            str(tmp_path / "out"),
            lambda: RemoteTeacher("http://filter", transport=httpx.MockTransport(refuse)),
            ScreenConfig(threads=2),
        )
