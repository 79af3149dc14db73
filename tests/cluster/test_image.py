"""The Dockerfile: best practices, and its install steps run in a clean directory without a container daemon."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "cluster" / "Dockerfile"


@dataclass(frozen=True)
class Instruction:
    stage: str
    word: str
    rest: str


def instructions() -> list[Instruction]:
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found, stage = [], ""
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line.strip():
            word, _, rest = line.strip().partition(" ")
            if word == "FROM":
                stage = rest.split(" AS ")[1]
            found.append(Instruction(stage, word, rest))
    return found


def ancestry(stage: str) -> list[str]:
    """A stage and its ancestors, the base image first."""
    parent = next(i.rest.split(" AS ")[0] for i in instructions() if i.word == "FROM" and i.stage == stage)
    known = {i.stage for i in instructions()}
    return [*(ancestry(parent) if parent in known else [parent]), stage]


def test_base_images_are_pinned() -> None:
    stages = {i.stage for i in instructions()}
    outside = [i.rest.split(" AS ")[0] for i in instructions() if i.word == "FROM"]
    outside = [image for image in outside if image not in stages]
    assert outside
    assert all(re.fullmatch(r"[a-z]+:\d+\.\d+\.\d+-[a-z-]+", image) for image in outside)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_targets_run_as_a_numeric_user(target: str) -> None:
    chain = ancestry(target)
    users = [i.rest for i in instructions() if i.word == "USER" and i.stage in chain]
    # runAsNonRoot needs a numeric user.
    assert users == ["10001:10001"]
    pods = yaml.safe_load((ROOT / "cluster" / "templates" / "pods.yaml").read_text())
    assert f"{pods['pod']['securityContext']['runAsUser']}:{pods['pod']['securityContext']['runAsGroup']}" == users[0]


def test_targets_contain_no_build_stage() -> None:
    for target in ("cpu", "cuda"):
        assert not {"builder", "built-cpu", "built-cuda"} & set(ancestry(target))


def test_hadolint_like_rules() -> None:
    found = instructions()
    stages = [i.stage for i in found if i.word == "FROM"]
    assert len(stages) == len(set(stages))
    words = {i.word for i in found}
    assert "ADD" not in words
    assert "MAINTAINER" not in words
    for i in found:
        if i.word == "WORKDIR":
            assert i.rest.startswith("/"), i
        if i.word == "RUN":
            assert not re.search(r"\b(sudo|wget|curl|apt-get)\b|cd ", i.rest), i
            # Packages are pinned; the project itself is installed with constraints.
            for package in re.findall(r"pip install (.*?)(?:&&|$)", i.rest):
                names = [word for word in package.split() if not word.startswith(("-", "https:", "constraints"))]
                assert all("==" in name or name.startswith('".[') for name in names), i
        if i.word in ("CMD", "ENTRYPOINT"):
            assert i.rest.startswith("["), i
        if i.word == "ENV":
            assert not re.search("PASSWORD|SECRET|_KEY|TOKEN=", i.rest), i
        if i.word == "COPY" and "--from" not in i.rest:
            assert i.rest.split()[0] != ".", "COPY . may copy unintended files"
    pipes = [i for i in found if i.word == "RUN" and "|" in i.rest.replace("||", "")]
    assert not pipes or any(i.word == "SHELL" and "pipefail" in i.rest for i in found)


def test_copied_files_exist_and_are_not_ignored() -> None:
    kept = {line[1:] for line in (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().split() if line[0] == "!"}
    copied = {
        name for i in instructions() if i.word == "COPY" and "--from" not in i.rest for name in i.rest.split()[:-1]
    }
    assert copied == kept
    assert [name for name in copied if not (ROOT / name).exists()] == []


def test_torch_is_the_pinned_version() -> None:
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert pinned is not None
    versions = {version for i in instructions() for version in re.findall(r"torch==(\S+)", i.rest)}
    assert versions == {pinned[1]}


@pytest.mark.slow
def test_install_steps_work_in_a_clean_directory(tmp_path: Path) -> None:
    """The RUN and COPY steps of the CPU image, in order, in an empty directory with a fresh environment."""
    source, venv = tmp_path / "src", tmp_path / "venv"
    source.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL"))}
    environment["PATH"] = f"{venv / 'bin'}:{Path(sys.executable).resolve().parent}:{environment['PATH']}"
    steps = [i for i in instructions() if i.stage in ancestry("built-cpu")]
    ran = 0
    for step in steps:
        if step.word == "COPY":
            *names, _ = step.rest.split()
            for name in names:
                _copy(ROOT / name, source / name)
        elif step.word == "RUN":
            command = step.rest.replace("/opt/venv", str(venv))
            if "--index-url" in command and os.environ.get("REFT_TORCH_LINKS", ""):
                # Without access to PyTorch's index: the same wheel from a directory.
                command = re.sub(r"--index-url \S+", f"--find-links {os.environ['REFT_TORCH_LINKS']}", command)
            done = subprocess.run(
                ["/bin/bash", "-o", "pipefail", "-c", command],
                cwd=source, env=environment, capture_output=True, text=True, timeout=1500,
            )  # fmt: skip
            assert done.returncode == 0, f"{step.rest}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            ran += 1
    assert ran == 3
    done = subprocess.run(
        [str(venv / "bin" / "reft-ray"), "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0
    assert "quickstart" in done.stdout


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    else:
        shutil.copy(source, target)
