"""A model from an object store: only its files, all or nothing, the same for every pod that asks."""

from __future__ import annotations

from pathlib import Path

import pytest

from reft_ray.core.errors import ReftError, UsageError
from reft_ray.hf.model_download import MARK, download, tree_digest


@pytest.fixture
def store(tmp_path: Path) -> Path:
    root = tmp_path / "store"
    (root / "sub").mkdir(parents=True)
    for name in (
        "model.safetensors",
        "config.json",
        "sub/chat_template.jinja",
        "pytorch_model.bin",
        "run.py",
        ".x.json",
    ):
        (root / name).write_bytes(name.encode() * 1000)
    return root


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_only_the_files_of_a_model_are_copied(store, tmp_path):
    target = tmp_path / "volume" / "base"
    digest = download(store.as_uri(), target)
    assert names(target) == {"model.safetensors", "config.json", "sub/chat_template.jinja", MARK}
    assert digest == tree_digest(target) == tree_digest(store)
    assert (target / "config.json").read_bytes() == (store / "config.json").read_bytes()


def test_a_second_pod_reads_nothing(store, tmp_path):
    target = tmp_path / "base"
    digest = download(store.as_uri(), target)
    (store / "model.safetensors").unlink()
    assert download(store.as_uri(), target) == digest
    assert download(store.as_uri(), target, digest) == digest


def test_another_digest_keeps_nothing(store, tmp_path):
    target = tmp_path / "base"
    with pytest.raises(ReftError, match="expected 0000"):
        download(store.as_uri(), target, "0" * 64)
    assert not target.exists()
    assert [path for path in tmp_path.iterdir() if path.name.endswith(".partial")] == []
    assert download(store.as_uri(), target, tree_digest(store)) == tree_digest(store)


def test_a_directory_in_use_is_not_replaced(store, tmp_path):
    target = tmp_path / "base"
    download(store.as_uri(), target)
    with pytest.raises(ReftError, match="choose another directory"):
        download((tmp_path / "other").as_uri(), target)
    with pytest.raises(ReftError, match="choose another directory"):
        download(store.as_uri(), target, "0" * 64)


def test_digests_follow_names_and_contents(store):
    before = tree_digest(store)
    (store / "run.py").write_text("other code is no part of the model")
    assert tree_digest(store) == before
    (store / "config.json").rename(store / "konfig.json")
    assert tree_digest(store) != before


@pytest.mark.parametrize(
    "uri",
    ["/local/path", "http://host/model", "hf://gpt2", "hf://org/name", "hf://a/b/c@main", "file:///none", "s3://"],
)
def test_what_cannot_be_read_is_one_line(uri, tmp_path):
    with pytest.raises(UsageError) as caught:
        download(uri, tmp_path / "base")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "base").exists()
