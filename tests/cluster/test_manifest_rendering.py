"""Rendered manifests equal their sources."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from reft_ray.cli.manifests import app
from reft_ray.core.errors import ReftError, UsageError
from reft_ray.serving import manifests as source

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The parts of a checkout that rendering reads and writes."""
    for name in ("cluster", "dashboards", "serve_configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    return tmp_path


def test_checked_in_manifests_are_current() -> None:
    assert source.stale(ROOT) == []


def test_every_marked_file_is_rendered() -> None:
    made = {f"cluster/{name}" for name in source.rendered(ROOT)}
    marked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "cluster").rglob("*.yaml")
        if path.read_text(encoding="utf-8").startswith("# Made by")
    }
    assert marked == made


def test_render_fixes_what_check_reports(checkout: Path) -> None:
    target = checkout / "cluster" / "base" / "rendered" / "service.yaml"
    target.write_text(target.read_text().replace("num-cpus: '0'", "num-cpus: '4'"))
    refused = CliRunner().invoke(app, ["check", "--root", str(checkout)])
    assert refused.exit_code == 1
    assert "cluster/base/rendered/service.yaml does not match its sources" in refused.stderr
    assert CliRunner().invoke(app, ["render", "--root", str(checkout)]).exit_code == 0
    assert CliRunner().invoke(app, ["check", "--root", str(checkout)]).exit_code == 0


def test_check_reads_serve_configs_strictly(checkout: Path) -> None:
    config = checkout / "serve_configs" / "autoscaling.yaml"
    config.write_text(config.read_text().replace("batch_tokens", "batch_token"))
    source.write(checkout)
    refused = CliRunner().invoke(app, ["check", "--root", str(checkout)])
    assert refused.exit_code == 1
    assert "did you mean batch_tokens?" in refused.stderr


def test_a_copy_of_a_config_is_read_strictly(tmp_path: Path) -> None:
    text = (ROOT / "serve_configs" / "service.yaml").read_text()
    copied = tmp_path / "service.yaml"
    copied.write_text(text)
    assert CliRunner().invoke(app, ["config", str(copied)]).exit_code == 0
    for content, said in (
        (text.replace("max_failures", "max_failure"), "did you mean max_failures?"),
        ("[1, 2]", "is not a Serve config"),
        ("a: [", "cannot be read"),
    ):
        copied.write_text(content)
        refused = CliRunner().invoke(app, ["config", str(copied)])
        assert refused.exit_code == 2
        assert said in refused.stderr
    assert "cannot be read" in CliRunner().invoke(app, ["config", str(tmp_path / "none")]).stderr


def test_every_dashboard_and_rule_is_embedded() -> None:
    files = source.rendered(ROOT)
    maps = list(yaml.safe_load_all(files["components/monitoring/rendered/dashboards.yaml"]))
    embedded = {name: json.loads(text) for item in maps for name, text in item["data"].items()}
    assert embedded == {f"reft-{p.name}": json.loads(p.read_text()) for p in (ROOT / "dashboards").glob("*.json")}
    rule = yaml.safe_load(files["components/monitoring/rendered/rules.yaml"])
    assert rule["spec"] == yaml.safe_load((ROOT / "dashboards" / "rules" / "reft.yaml").read_text())
    # The limits are 1 MiB for a ConfigMap and 256 KiB for the annotation of client-side apply.
    assert all(len(json.dumps(item)) < 200_000 for item in maps)


def test_a_serve_config_changes_only_in_host_and_paths() -> None:
    config = yaml.safe_load((ROOT / "serve_configs" / "local.yaml").read_text())
    before = copy.deepcopy(config)
    made = source.serve_config(config, "/mnt/teacher")
    assert config == before
    assert made["http_options"]["host"] == "0.0.0.0"
    (application,), (original,) = made["applications"], before["applications"]
    teacher = next(item for item in application["deployments"] if item["name"] == "Teacher")
    assert teacher["user_config"].pop("teacher") == "/mnt/teacher"
    next(item for item in original["deployments"] if item["name"] == "Teacher")["user_config"].pop("teacher")
    application.pop("args")
    original.pop("args")
    assert application == original


def test_an_object_store_uri_is_kept() -> None:
    config = {"applications": [{"args": {"screenings_uri": "s3://bucket/x"}, "deployments": []}]}
    assert source.serve_config(config, "t")["applications"][0]["args"]["screenings_uri"] == "s3://bucket/x"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"rayClusterConfig": {"role": "serve", "groups": []}},
            "no role 'serve'; it has service, job, interactive, vllm",
        ),
        (
            {"rayClusterConfig": {"role": "job", "groups": [{"name": "tpu"}]}},
            "no group 'tpu'; it has cpu, gpu, spot-gpu",
        ),
        ({"cluster": {}}, "RayService x: no cluster"),
    ],
)
def test_an_invalid_template_is_a_one_line_error(spec: dict, message: str) -> None:
    pods = yaml.safe_load((ROOT / "cluster" / "templates" / "pods.yaml").read_text())
    with pytest.raises(ReftError, match=message) as caught:
        source.ray_document({"kind": "RayService", "metadata": {"name": "x"}, "spec": spec}, pods)
    assert "\n" not in str(caught.value)


def test_outside_of_a_checkout_is_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="with --root"):
        source.rendered(tmp_path)
    done = CliRunner().invoke(app, ["render", "--root", str(tmp_path)])
    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 1
