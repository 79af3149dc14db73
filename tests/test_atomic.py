"""Files and directories appear whole or not at all."""

from pathlib import Path

import pytest

from reft_ray.atomic import atomic_directory, atomic_write


def test_a_file_replaces_an_older_one_only_when_the_block_succeeds(tmp_path: Path) -> None:
    path = tmp_path / "made" / "file.json"
    with atomic_write(path) as scratch:
        scratch.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"

    def fail() -> None:
        with atomic_write(path) as scratch:
            scratch.write_text("two")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fail()
    assert path.read_text() == "one"
    assert [file.name for file in path.parent.iterdir()] == ["file.json"]


def test_a_directory_appears_whole_and_replaces_an_older_one_only_if_asked(tmp_path: Path) -> None:
    path = tmp_path / "made" / "model"

    def write(text: str, **options: bool) -> None:
        with atomic_directory(path, **options) as scratch:
            assert scratch.name == "model"
            (scratch / text).write_text(text)

    write("one")
    write("two", replace=True)
    with pytest.raises(OSError, match="not empty"):
        write("three")
    assert [file.name for file in path.iterdir()] == ["two"]
    assert [folder.name for folder in path.parent.iterdir()] == ["model"]
