"""Directories at `pyarrow.fs` URIs: upload, copy, list, and download for code that reads local files; their hashes."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from pyarrow import fs


def put_folder(folder: Path, uri: str) -> str:
    """Copy a local directory to a URI, replacing its content; returns the URI."""
    filesystem, path = fs.FileSystem.from_uri(uri)
    filesystem.create_dir(path, recursive=True)
    filesystem.delete_dir_contents(path)
    fs.copy_files(str(folder), path, source_filesystem=fs.LocalFileSystem(), destination_filesystem=filesystem)
    return uri


def copy_folder(source: str, target: str) -> None:
    """Copy a directory between URIs."""
    filesystem, path = fs.FileSystem.from_uri(target)
    filesystem.create_dir(path, recursive=True)
    fs.copy_files(source, target)


def files_in(uri: str) -> list[str]:
    """The relative paths of the files below a URI; empty where it does not exist."""
    filesystem, path = fs.FileSystem.from_uri(uri)
    found = filesystem.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
    return sorted(info.path[len(path) :].lstrip("/") for info in found if info.type is fs.FileType.File)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a local file, in hex."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


@contextmanager
def local_folder(uri: str) -> Iterator[Path]:
    """A local directory with the content of the URI: the URI's own where it is local, else a temporary copy.

    Raises FileNotFoundError where it has no files.
    """
    filesystem, path = fs.FileSystem.from_uri(uri)
    if not files_in(uri):
        raise FileNotFoundError(2, "No such directory", urlsplit(uri).path)
    if isinstance(filesystem, fs.LocalFileSystem):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="reft-artefact-") as scratch:
        fs.copy_files(path, scratch, source_filesystem=filesystem, destination_filesystem=fs.LocalFileSystem())
        yield Path(scratch)
