"""`reft-ray telemetry`."""

import json

from typer.testing import CliRunner

from reft_ray.cli.telemetry import app
from reft_ray.telemetry import rendering
from reft_ray.telemetry.catalog import METRICS


def test_render_writes_every_file(tmp_path):
    done = CliRunner().invoke(app, ["render", "--out", str(tmp_path)])
    assert done.exit_code == 0
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")} == rendering.rendered().keys()


def test_render_onto_a_file_is_a_one_line_error(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    done = CliRunner().invoke(app, ["render", "--out", str(path)])
    assert done.exit_code == 1
    assert len(done.stderr.splitlines()) == 1


def test_metrics_lists_the_catalogue():
    listed = json.loads(CliRunner().invoke(app, ["metrics", "--json"]).stdout)
    assert [metric["name"] for metric in listed] == [metric.name for metric in METRICS]
    assert METRICS[0].name[:20] in CliRunner().invoke(app, ["metrics"]).stdout
