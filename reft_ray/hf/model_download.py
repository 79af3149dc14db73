"""A model's files from a hub or an object store, checked against one digest, for the volume of a cluster.

Only files that a model is made of are copied: safetensors and GGUF weights, tokenizers, templates and JSON. A directory
that is complete stays as it is, so that many pods may ask for it; one of them copies, the others wait for its lock.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from filelock import FileLock
from pyarrow import ArrowException, fs

from reft_ray.core.errors import ReftError, UsageError, first_line

MARK = "download.json"
SUFFIXES = (".safetensors", ".gguf", ".json", ".jinja", ".txt", ".model", ".md")
SCHEMES = ("hf", "s3", "gs", "file")
_BLOCK = 1 << 20


def download(uri: str, folder: Path, sha256: str | None = None) -> str:
    """Copy `uri` (hf://ORG/NAME@REVISION, s3://, gs://, file://) into `folder`; returns the digest of its files.

    Raises UsageError for a URI that cannot be read and ReftError for a digest that differs: then `folder` is unchanged.
    """
    scheme, _, place = uri.partition("://")
    # Without a place, a store would be asked for all that it has.
    if not place or scheme not in SCHEMES:
        raise UsageError(f"{uri}: expected hf://ORG/NAME@REVISION, s3://BUCKET/PATH, gs://BUCKET/PATH or file:///PATH")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        present = _mark(folder)
        if present is not None and present["uri"] == uri and sha256 in (None, present["sha256"]):
            return present["sha256"]
        if folder.exists():
            was = present["uri"] if present else "something that no download made"
            raise ReftError(
                f"{folder} already holds {was}: choose another directory, because replicas may use this one"
            )
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            (_from_hub if scheme == "hf" else _from_store)(uri, partial)
            found = tree_digest(partial)
            if sha256 is not None and found != sha256:
                raise ReftError(f"{uri} has the digest {found}, expected {sha256}: nothing was kept")
            (partial / MARK).write_text(json.dumps({"uri": uri, "sha256": found}), encoding="utf-8")
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return found


def tree_digest(folder: Path) -> str:
    """SHA-256 over the names and the SHA-256 of all model files below a directory, in order of their names."""
    whole = hashlib.sha256()
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and wanted(path.name))
    for path in paths:
        with path.open("rb") as stream:
            inner = hashlib.file_digest(stream, "sha256").hexdigest()
        whole.update(f"{inner}  {path.relative_to(folder).as_posix()}\n".encode())
    return whole.hexdigest()


def wanted(name: str) -> bool:
    """Whether a file may be part of a model: no pickle, no code, no hidden file."""
    return name.endswith(SUFFIXES) and not name.startswith(".") and name != MARK


def _from_store(uri: str, folder: Path) -> None:
    try:
        store, root = fs.FileSystem.from_uri(uri)
        found = store.get_file_info(fs.FileSelector(root, recursive=True))
        names = list(_names(root, found))
        for name in names:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with store.open_input_stream(f"{root}/{name}") as source, target.open("wb") as stream:
                while block := source.read(_BLOCK):
                    stream.write(block)
    except (ArrowException, OSError, ValueError) as error:
        raise UsageError(f"{uri} cannot be read: {first_line(error)}") from None
    if not names:
        raise UsageError(f"{uri} has no file of a model ({', '.join(SUFFIXES)})")


def _names(root: str, found: list[fs.FileInfo]) -> Iterator[str]:
    """Relative names of the model files; an object's name may say anything, so nothing above the directory."""
    for info in found:
        name = info.path.removeprefix(root).lstrip("/")
        parts = PurePosixPath(name).parts
        if info.is_file and wanted(info.base_name) and ".." not in parts and not name.startswith("/"):
            yield name


def _from_hub(uri: str, folder: Path) -> None:
    name, _, revision = uri.removeprefix("hf://").partition("@")
    if name.count("/") != 1 or not revision:
        raise UsageError(f"{uri}: expected hf://ORG/NAME@REVISION, with a commit or tag, so that it stays the same")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        snapshot_download(
            name, revision=revision, local_dir=folder, allow_patterns=[f"*{suffix}" for suffix in SUFFIXES]
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise UsageError(f"{uri} cannot be read: {first_line(error)}") from None
    # The hub's own bookkeeping.
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def _mark(folder: Path) -> dict[str, str] | None:
    try:
        mark: dict[str, str] = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return mark if {"uri", "sha256"} <= mark.keys() else None
