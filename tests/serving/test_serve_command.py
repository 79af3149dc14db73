"""`reft-ray serve` reports wrong usage in one line."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from reft_ray.cli.serve import _service, serve
from reft_ray.core.errors import UsageError
from reft_ray.hf.ref_teacher import RefTeacher
from reft_ray.serving import LOW_LATENCY
from reft_ray.serving.args import ServeArgs
from reft_ray.serving.local import local_service
from reft_ray.teachers import BUILTIN, teacher_folder

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


def test_the_builtin_teacher_comes_with_the_package_and_is_small() -> None:
    folder = teacher_folder(BUILTIN)
    made = RefTeacher.load(folder).manifest
    assert (made.base_name, made.geometry) == ("smollm2", "whitened")
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 8e6
    assert teacher_folder("other") == Path("other")


@pytest.mark.parametrize(
    ("options", "name", "base"),
    [({}, "builtin", "smollm2"), ({"base": "/models/mine"}, "mine", "/models/mine")],
)
def test_the_whole_service_is_served_for_the_packaged_or_ones_own_model(
    tmp_path: Path, options: dict[str, str], name: str, base: str
) -> None:
    section = _service(tmp_path, str(teacher_folder(BUILTIN)), options.get("base"), 0, {})
    ServeArgs.of({"service": section}, "serve")
    assert section["base_models"][name]["uri"] == base
    assert list(section["options"]["bases"]) == [name]


def test_the_handles_of_a_local_service_call_over_grpc() -> None:
    """Serve reads its settings when it is imported: set later, they would reach the replicas but not the handles."""
    code = (
        "import reft_ray.serving.local\n"
        "from ray.serve._private.handle_options import DynamicHandleOptions\n"
        "print(DynamicHandleOptions()._by_reference)"
    )
    environment = {name: value for name, value in os.environ.items() if name not in LOW_LATENCY}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
