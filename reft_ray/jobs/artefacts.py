"""Directories behind `pyarrow.fs` URIs: put there, and brought here for code that reads local files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from pyarrow import fs


def put_folder(folder: Path, uri: str) -> str:
    """Copy a local directory to a URI, replacing what is there; the URI."""
    filesystem, path = fs.FileSystem.from_uri(uri)
    filesystem.create_dir(path, recursive=True)
    filesystem.delete_dir_contents(path)
    fs.copy_files(str(folder), path, source_filesystem=fs.LocalFileSystem(), destination_filesystem=filesystem)
    return uri


def copy_folder(source: str, target: str) -> None:
    """Copy a directory between URIs."""
    there, path = fs.FileSystem.from_uri(target)
    there.create_dir(path, recursive=True)
    fs.copy_files(source, target)


def files_in(uri: str) -> list[str]:
    """The files below a URI, by their paths relative to it; none where nothing is."""
    filesystem, path = fs.FileSystem.from_uri(uri)
    found = filesystem.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
    return sorted(info.path[len(path) :].lstrip("/") for info in found if info.type is fs.FileType.File)


@contextmanager
def local_folder(uri: str) -> Iterator[Path]:
    """A directory on this machine with what lies at the URI: itself where it is local, else a copy for the block.

    Raises FileNotFoundError where there is nothing.
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
