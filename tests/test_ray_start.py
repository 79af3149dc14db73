"""A Ray that does not start in time is started once more; a second such failure is an error of one line."""

import importlib.util
from collections.abc import Callable

import pytest
import typer

from reft_ray import local_ray
from reft_ray.cli.common import user_errors

LATE = "The current node timed out during startup. This could happen because some of the raylet failed to startup"


class Node:
    """As Ray's: the constructor starts processes and raises."""

    ended = 0

    def __init__(self, message: str) -> None:
        raise RuntimeError(message)

    def get_logs_dir_path(self) -> str:
        return "/tmp/ray/session_1/logs"

    def kill_all_processes(self, check_alive: bool, allow_graceful: bool) -> None:
        assert not check_alive, "the raylet has ended by itself"
        Node.ended += 1


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], list[str]]:
    """Let the next starts fail with these messages, and later ones not; the list shrinks with each."""

    def fail(messages: list[str]) -> list[str]:
        def init(**_: object) -> None:
            if messages:
                Node(messages.pop(0))

        monkeypatch.setattr(local_ray.ray, "init", init)
        return messages

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(local_ray.ray, "shutdown", lambda: None)
    monkeypatch.setattr(Node, "ended", 0)
    return fail


def test_a_late_ray_is_ended_and_started_once_more(starts, caplog: pytest.LogCaptureFixture) -> None:
    left = starts([LATE])
    local_ray.start_own_ray(1)
    assert left == []
    assert Node.ended == 1
    assert "/tmp/ray/session_1/logs/raylet.out" in caplog.text


def test_a_ray_that_is_late_twice_is_said_in_one_line(starts, capsys: pytest.CaptureFixture[str]) -> None:
    left = starts([LATE, LATE, LATE])
    with pytest.raises(TimeoutError) as raised:
        local_ray.start_own_ray(1)
    assert len(left) == 1
    assert Node.ended == 2
    assert "\n" not in str(raised.value)
    starts([LATE, LATE])
    with pytest.raises(typer.Exit), user_errors():
        local_ray.start_own_ray(1)
    assert capsys.readouterr().err.endswith("on this machine, or see: /tmp/ray/session_1/logs/raylet.out\n")


def test_another_failure_is_not_tried_again(starts) -> None:
    left = starts(["no free port", "no free port"])
    with pytest.raises(RuntimeError, match="no free port"):
        local_ray.start_own_ray(1)
    assert len(left) == 1
    assert Node.ended == 0


def test_no_package_makes_each_import_of_ray_slow() -> None:
    """Ray imports jsonschema, and that this package where it is installed: it builds grammars, which takes seconds."""
    assert importlib.util.find_spec("rfc3987_syntax") is None, "a package requires jsonschema[format-nongpl]"
