"""`reft-ray serve` reports wrong usage in one line."""

import socket
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from reft_ray.cli.serve import serve
from reft_ray.core.errors import UsageError
from reft_ray.serving.args import ServeArgs
from reft_ray.serving.builtin import BUILTIN, teacher_folder
from reft_ray.serving.local import local_service

app = typer.Typer()
app.command()(serve)


def test_a_missing_teacher_is_reported_at_once() -> None:
    result = CliRunner().invoke(app, ["--teacher", "/nowhere"])
    assert result.exit_code == 1
    assert result.output == "error: No such teacher directory: /nowhere\n"


def test_a_wrong_value_is_a_usage_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["--teacher", str(tmp_path), "--precision", "float8"])
    assert result.exit_code == 2
    assert "teacher.precision" in result.output


def test_a_port_in_use_is_a_usage_error() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(UsageError, match="choose another"),
        local_service(ServeArgs(), taken.getsockname()[1]),
    ):
        pytest.fail("the port is taken")


def test_the_builtin_teacher_must_have_been_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFT_CACHE", str(tmp_path))
    with pytest.raises(Exception, match="run `reft-ray serve` once"):
        teacher_folder(BUILTIN)
    (tmp_path / "builtin-teacher").mkdir()
    (tmp_path / "builtin-teacher" / "teacher.json").touch()
    assert teacher_folder(BUILTIN) == tmp_path / "builtin-teacher"
