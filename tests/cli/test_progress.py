"""The phases of a command as lines of a log."""

import re

import pytest

from reft_ray.cli import progress
from reft_ray.cli.progress import bar, duration


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_phase_has_a_line_every_ten_seconds_with_an_estimate_of_its_own(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with bar("loading") as shown:
        clock.now = 30
        # A resumed run begins in the middle: the estimate is of what this run does.
        shown.phase("training", 0.5)
        clock.now = 35
        shown.phase("training", 0.55, "step 11 of 20, loss 2.000")
        clock.now = 45
        shown.phase("training", 0.6, "step 12 of 20, loss 1.900")
        clock.now = 56
        shown.phase("training", 0.6, "step 12 of 20, loss 1.900")
        clock.now = 90
        shown.phase("export")
    assert lines(capsys) == [
        "loading: done in 30 s",
        "training: 60%, step 12 of 20, loss 1.900, about 60 s left",
        "training: 60%, step 12 of 20, loss 1.900, about 49 s left",
        "training: done in 60 s, step 12 of 20, loss 1.900",
        "export: done in 0 s",
    ]


def test_lines_come_also_while_nothing_is_reported(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(progress, "TICK_SECONDS", 0.01)
    shown = ""
    with bar("loading"):
        while "\n" not in shown:
            shown += capsys.readouterr().err
    assert re.fullmatch(r"loading: \d+ s", shown.splitlines()[0])


def test_a_phase_that_fails_is_not_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), bar("loading"):
        raise RuntimeError
    assert lines(capsys) == []


def test_reports_of_a_run_move_the_phase(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with bar("Ref-Teacher") as shown:
        clock.now = 12
        shown.update({"progress": 0.25, "total": 1.5, "note": "row 3: left out"})
    assert lines(capsys) == [
        "note: row 3: left out",
        "Ref-Teacher: 25%, loss 1.500, about 36 s left",
        "Ref-Teacher: done in 12 s, loss 1.500",
    ]


def test_nothing_is_shown_if_quiet(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with bar("loading", quiet=True) as shown:
        clock.now = 100
        shown.phase("training", 0.5)
        shown.note({"note": "row 3: left out"})
    assert lines(capsys) == []


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 89, 100, 5399, 7200)] == ["0 s", "89 s", "2 min", "90 min", "2.0 h"]
