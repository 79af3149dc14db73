"""Input files: paths, globs and `pyarrow.fs` URIs, with the container and compression of each file."""

from __future__ import annotations

import fnmatch
import functools
import glob
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs

from reft_ray.core.errors import UsageError, first_line
from reft_ray.rows.first_bytes import HEAD_BYTES, Json, json_layout, not_data
from reft_ray.screening.inflating import InflatedStream


class Container(StrEnum):
    """The file format."""

    JSONL = "jsonl"
    JSON = "json"
    CSV = "csv"
    PARQUET = "parquet"
    ARROW = "arrow"

    @property
    def textual(self) -> bool:
        """Whether a row is a byte range of the file."""
        return self in (Container.JSONL, Container.CSV)

    @property
    def columnar(self) -> bool:
        """Whether a row is a slice of columns."""
        return self in (Container.PARQUET, Container.ARROW)


SUFFIXES = {
    ".jsonl": Container.JSONL,
    ".ndjson": Container.JSONL,
    ".json": Container.JSON,
    ".csv": Container.CSV,
    ".tsv": Container.CSV,
    ".parquet": Container.PARQUET,
    ".arrow": Container.ARROW,
    ".feather": Container.ARROW,
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_OF_ARROW = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs", "file", "mock")
"""Schemes that `pyarrow.fs` reads itself; others are read by fsspec, e.g. hf://."""
_OPENED = 16
COMPRESSION_MAGIC = ((b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"))


@dataclass(frozen=True, slots=True)
class Source:
    """One input file. `uri` may contain credentials and is not shown; `name` is. `version` is the modification time
    in nanoseconds."""

    uri: str
    name: str
    size: int
    version: int
    container: Container
    compression: str | None

    def open(self) -> pa.NativeFile:
        """The stored bytes, for random access."""
        filesystem, path = filesystem_of(self.uri)
        return filesystem.open_input_file(path)

    def stream(self) -> pa.NativeFile | InflatedStream:
        """A stream of the decompressed bytes, which ends with UsageError where there are too many."""
        stored = self.open()
        return InflatedStream(stored, self.compression, self.name, self.size) if self.compression else stored


def filesystem_of(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a path or URI, and the path in it; the files of a bucket share a client."""
    if "://" not in uri:
        return pafs.LocalFileSystem(), str(Path(uri).absolute())
    parts = urlsplit(uri)
    if parts.scheme == "file":
        return pafs.LocalFileSystem(), parts.path
    query = f"?{parts.query}" if parts.query else ""
    try:
        filesystem, root = _client(f"{parts.scheme}://{parts.netloc}", query)
    except (pa.ArrowInvalid, OSError, ValueError) as error:
        raise UsageError(f"{display_name(uri)}: {first_line(error)}") from error
    return filesystem, f"{root}{parts.path}".rstrip("/")


@functools.lru_cache(maxsize=16)
def _client(root: str, query: str) -> tuple[pafs.FileSystem, str]:
    scheme = root.partition("://")[0]
    if scheme in _OF_ARROW:
        filesystem, path = pafs.FileSystem.from_uri(f"{root}{query}")
        return filesystem, str(path).rstrip("/")
    if scheme not in fsspec.available_protocols():
        raise ValueError(f"no file system is known for {scheme}://")
    try:
        other, path = fsspec.url_to_fs(root)
    except ImportError as error:
        raise ValueError(f"{scheme}:// needs a package: {first_line(error)}") from None
    return pafs.PyFileSystem(pafs.FSSpecHandler(other)), str(path).rstrip("/")


def display_name(uri: str) -> str:
    """A path or URI without credentials and without query."""
    if "://" not in uri:
        return uri
    parts = urlsplit(uri)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def find_sources(inputs: Sequence[str | Source], container: Container | None = None) -> list[Source]:
    """Every file that the inputs name, sorted by name within each input; a directory means the data files in it.

    An input may be a Source already. Raises UsageError for a file that is missing, damaged or not data.
    """
    if not inputs:
        raise UsageError("no input: name a file, a directory, a glob or a URI")
    sources: dict[str, Source] = {}
    for item in inputs:
        if isinstance(item, Source):
            sources.setdefault(item.uri, item)
            continue
        found = files_at(item)
        if not found:
            raise UsageError(f"{display_name(item)}: no such file, or no data file in it")
        new = [(uri, name) for uri, name in found if uri not in sources]
        # Each is opened, and a bucket takes long to answer.
        with ThreadPoolExecutor(_OPENED) as pool:
            opened = pool.map(lambda file: source_of(file[0], file[1], container), new)
            sources.update((source.uri, source) for source in opened)
    return list(sources.values())


def files_at(item: str) -> list[tuple[str, str]]:
    """(URI or path, name to show) of every data file that a path, glob or URI means, sorted; none is opened."""
    return _remote(item) if "://" in item else _local(item)


def stamp_of(uri: str) -> tuple[int, int]:
    """(size, time of change in nanoseconds) of a file; zeros for a missing one."""
    filesystem, path = filesystem_of(uri)
    info = filesystem.get_file_info([path])[0]
    return (info.size or 0, info.mtime_ns or 0) if info.type == pafs.FileType.File else (0, 0)


def _local(item: str) -> list[tuple[str, str]]:
    path = Path(item).expanduser()
    if path.is_dir():
        paths = sorted(entry for entry in path.rglob("*") if entry.is_file() and _known(entry.name))
    elif path.exists():
        paths = [path]
    else:
        matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 (Path.glob cannot start from an absolute pattern)
        paths = sorted(entry for entry in map(Path, matches) if entry.is_file())
    return [(str(entry.absolute()), str(entry)) for entry in paths]


def _remote(item: str) -> list[tuple[str, str]]:
    filesystem, path = filesystem_of(item)
    parts = urlsplit(item)
    literal = path if not _has_magic(path) else path[: _magic_at(path)].rpartition("/")[0]
    try:
        infos = filesystem.get_file_info([literal])
        if infos[0].type == pafs.FileType.Directory:
            infos = filesystem.get_file_info(pafs.FileSelector(literal, recursive=True))
    except OSError as error:
        raise UsageError(f"{display_name(item)}: {first_line(error)}") from error
    files = [info for info in infos if info.type == pafs.FileType.File]
    if _has_magic(path):
        files = [info for info in files if fnmatch.fnmatchcase(info.path, path)]
    elif len(files) != 1 or files[0].path != path:
        files = [info for info in files if _known(info.base_name)]
    root = len(path) - len(parts.path.rstrip("/"))
    uris = [
        parts._replace(path=info.path[root:], fragment="").geturl()
        for info in sorted(files, key=lambda info: info.path)
    ]
    return [(uri, display_name(uri)) for uri in uris]


def _has_magic(path: str) -> bool:
    return any(char in path for char in "*[")


def _magic_at(path: str) -> int:
    return min(path.index(char) for char in "*[" if char in path)


def _known(name: str) -> bool:
    path = Path(name.lower())
    inner = Path(path.stem) if path.suffix in COMPRESSIONS else path
    return inner.suffix in SUFFIXES and not name.startswith((".", "_"))


def source_of(uri: str, name: str, container: Container | None = None) -> Source:
    """One file under a name of its own, e.g. that of its owner. Raises UsageError under this name alone."""
    filesystem, path = filesystem_of(uri)
    try:
        (info,) = filesystem.get_file_info([path])
        if info.type != pafs.FileType.File:
            raise UsageError(f"{name}: no such file")
        with filesystem.open_input_file(path) as stored:
            head = bytes(stored.read(HEAD_BYTES))
        compression = next((codec for magic, codec in COMPRESSION_MAGIC if head.startswith(magic)), None)
        if compression:
            with filesystem.open_input_file(path) as stored:
                head = _first_bytes(stored, compression, name)
    except OSError as error:
        raise UsageError(f"{name}: cannot be read: {first_line(error).replace(path, name)}") from None
    if what := not_data(head):
        raise UsageError(f"{name}: the file is {what}")
    found = container or _detected_container(head, name)
    if compression and found.columnar:
        raise UsageError(f"{name}: {found} files compress their columns; decompress the file first")
    return Source(uri, name, info.size, info.mtime_ns or 0, found, compression)


def _first_bytes(stored: Any, compression: str, name: str) -> bytes:
    try:
        with pa.CompressedInputStream(stored, compression) as stream:
            return bytes(stream.read(HEAD_BYTES))
    except OSError as error:
        raise UsageError(f"{name}: damaged {compression} file: {first_line(error)}") from None


def _detected_container(head: bytes, name: str) -> Container:
    """The container by its first bytes, where they tell more than the name does."""
    if head.startswith(b"PAR1"):
        return Container.PARQUET
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return Container.ARROW
    path = Path(name.lower())
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix
    named = SUFFIXES.get(suffix)
    if named is Container.CSV:
        return named
    layout = json_layout(head)
    if layout is Json.TEXT or (named is Container.JSON and layout and head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["):
        return Container.JSON
    if layout is Json.LINES or named is Container.JSONL:
        return Container.JSONL
    if named is not None:
        raise UsageError(f"{name}: the file is empty or not {named}")
    raise UsageError(f"{name}: unknown file format; name it with --container ({', '.join(Container)})")
