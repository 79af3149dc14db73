"""Which teacher judges: signed changes, and the way back."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from reft_ray.cli.main import app
from reft_ray.core.errors import ReftError, UsageError
from reft_ray.core.verdict import Thresholds
from reft_ray.hf.ref_teacher import RefTeacher, save_with_manifest
from reft_ray.hf.signatures import make_keys
from reft_ray.hf.teacher_shelf import TeacherShelf
from reft_ray.teachers import BUILTIN, teacher_folder


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The packaged teacher, and with two other block thresholds."""
    old = RefTeacher.load(teacher_folder(BUILTIN))
    made = [old.folder]
    for step in (0.01, 0.02):
        thresholds = Thresholds(old.manifest.thresholds.review, old.manifest.thresholds.block + step)
        folder = tmp_path_factory.mktemp("teachers") / "made"
        made.append(save_with_manifest(folder, old, replace(old.manifest, thresholds=thresholds)).folder)
    return made


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return make_keys(tmp_path / "keys")


def test_changes_are_signed_and_taken_back(teachers: list[Path], keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    shelf = TeacherShelf(tmp_path / "shelf", private)
    ids = [RefTeacher.load(folder).id for folder in teachers]
    with pytest.raises(UsageError, match="no teacher to go back to"):
        shelf.rollback("ann", "why")
    for folder in teachers:
        shelf.install(folder, "ann", "new thresholds")
    current = tmp_path / "shelf" / "current"
    assert RefTeacher.load(current).id == ids[2]
    with pytest.raises(UsageError, match="already"):
        shelf.install(teachers[2], "ann", "again")
    shelf.rollback("bob", "too strict")
    assert RefTeacher.load(current).id == ids[1]
    shelf.rollback("bob", "still")
    assert RefTeacher.load(current).id == ids[0]
    with pytest.raises(UsageError, match="no teacher to go back to"):
        shelf.rollback("bob", "further")
    shelf.install(teachers[2], "ann", "it was right")
    read = TeacherShelf(tmp_path / "shelf", public)
    read.check()
    assert [(change.kind, change.before, change.teacher) for change in read.changes()] == [
        ("install", None, ids[0]),
        ("install", ids[0], ids[1]),
        ("install", ids[1], ids[2]),
        ("rollback", ids[2], ids[1]),
        ("rollback", ids[1], ids[0]),
        ("install", ids[0], ids[2]),
    ]
    assert read.changes()[-1].thresholds["block"] == RefTeacher.load(teachers[2]).manifest.thresholds.block
    with pytest.raises(UsageError, match="public key only reads"):
        read.rollback("eve", "why")
    with pytest.raises(UsageError, match="a name and a reason"):
        shelf.rollback("ann", " ")


@pytest.mark.parametrize("damage", ["reason", "order", "gap", "key", "link"])
def test_an_altered_history_is_found(
    teachers: list[Path], keys: tuple[Path, Path], tmp_path: Path, damage: str
) -> None:
    folder = tmp_path / "shelf"
    shelf = TeacherShelf(folder, keys[0])
    for made in teachers:
        shelf.install(made, "ann", "new thresholds")
    log = folder / "changes.jsonl"
    entries = log.read_bytes().splitlines(keepends=True)
    key = keys[1]
    match damage:
        case "reason":
            log.write_bytes(b"".join(entries).replace(b"new thresholds", b"old thresholds"))
        case "order":
            log.write_bytes(b"".join([entries[1], entries[0], entries[2]]))
        case "gap":
            log.write_bytes(b"".join([entries[0], entries[2]]))
        case "key":
            key = make_keys(tmp_path / "others")[1]
        case "link":
            (folder / "current").unlink()
            (folder / "current").symlink_to(RefTeacher.load(teachers[0]).id)
    done = CliRunner().invoke(app, ["teacher", "history", "--shelf", str(folder), "--key", str(key)])
    assert done.exit_code == 1
    assert len(done.stderr.strip().splitlines()) == 1
    if damage != "link":
        with pytest.raises(ReftError, match="entry"):
            TeacherShelf(folder, key).changes()


def test_the_commands(teachers: list[Path], keys: tuple[Path, Path], tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["teacher", *arguments, "--shelf", str(tmp_path / "shelf")])
        assert done.exit_code == 0, done.stderr
        return done.stdout

    signed = ["--key", str(keys[0]), "--by", "ann", "--reason", "fewer false alarms"]
    run("install", BUILTIN, *signed)
    run("install", str(teachers[1]), *signed)
    assert "fewer false alarms" in run("rollback", *signed)
    changes = json.loads(run("history", "--key", str(keys[1]), "--json"))
    assert [change["kind"] for change in changes] == ["install", "install", "rollback"]
