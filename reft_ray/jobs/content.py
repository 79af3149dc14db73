"""Bytes at any `pyarrow.fs` URI (a directory, s3://, gs://, abfss://), streamed with a size limit and a hash."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from reft_ray.core.errors import UsageError
from reft_ray.jobs.errors import TooLargeError

CHUNK_BYTES = 1 << 20
LINE_BYTES = 8 << 20
"""Length at which a line is cut off: no row is longer, and a file without a line feed is not kept in memory."""

_PARTIAL = ".partial"

_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")


@dataclass(frozen=True, slots=True)
class Written:
    """Size and hash of written bytes."""

    bytes: int
    sha256: str


class ContentStore:
    """Named byte strings below one URI. Raises ValueError for a key that could leave it."""

    def __init__(self, uri: str) -> None:
        if "?" in uri:
            # Keys are appended to the URI, which jobs open in other processes.
            raise UsageError(
                f"file store {uri.partition('?')[0]!r}: it takes no options; name an S3 server by AWS_ENDPOINT_URL"
            )
        try:
            self._fs, self._root = fs.FileSystem.from_uri(uri)
        except (pa.ArrowInvalid, ValueError) as error:
            raise UsageError(
                f"file store {uri!r}: {error}; use an absolute path or a URI such as s3://bucket"
            ) from None
        self._local = isinstance(self._fs, fs.LocalFileSystem)
        self._create_dir(self._root)
        self._uri = uri.rstrip("/")

    def uri(self, key: str) -> str:
        """The URI of a key or of a directory of keys."""
        return f"{self._uri}/{_checked(key)}"

    def write(self, key: str, chunks: Iterable[bytes], limit: int | None = None) -> Written:
        """Store the chunks under a key atomically. Raises TooLargeError above `limit` bytes."""
        path, temporary = self._path(key), f"{self._root}/{_PARTIAL}/{secrets.token_hex(16)}"
        self._create_dir(path.rpartition("/")[0])
        self._create_dir(f"{self._root}/{_PARTIAL}")
        if self._local:
            Path(temporary).touch(0o600)  # the file keeps this mode
        digest, size = hashlib.sha256(), 0
        try:
            with self._fs.open_output_stream(temporary) as stream:
                for chunk in chunks:
                    size += len(chunk)
                    if limit is not None and size > limit:
                        raise TooLargeError(f"The content is larger than the allowed {limit} bytes.")
                    digest.update(chunk)
                    stream.write(chunk)
            self._fs.move(temporary, path)
        except BaseException:
            self._remove(temporary)
            raise
        return Written(size, digest.hexdigest())

    def read(self, key: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        """Read the bytes of a key in chunks. Raises FileNotFoundError."""
        stream = self._fs.open_input_stream(self._path(key))

        def chunks() -> Iterator[bytes]:
            with stream:
                while chunk := stream.read(chunk_bytes):
                    yield chunk

        return chunks()

    def read_range(self, key: str, offset: int, size: int) -> bytes:
        """Read `size` bytes from `offset`, or fewer at the end. Raises FileNotFoundError."""
        with self._fs.open_input_file(self._path(key)) as stored:
            return bytes(stored.read_at(size, offset))

    def delete(self, key: str) -> None:
        """Remove the bytes of a key, if any."""
        self._remove(self._path(key))

    def delete_tree(self, key: str) -> None:
        """Remove everything below a key, if anything."""
        path = self._path(key)
        if self._fs.get_file_info(path).type is fs.FileType.Directory:
            self._fs.delete_dir(path)

    def names(self) -> list[str]:
        """The names of the files at the top."""
        found = self._fs.get_file_info(fs.FileSelector(self._root))
        return [info.base_name for info in found if info.type is fs.FileType.File]

    def exists(self, key: str) -> bool:
        """Whether a key has bytes."""
        return self._fs.get_file_info(self._path(key)).type is fs.FileType.File

    def sweep(self, older_than: float) -> int:
        """Remove what killed writers left, unwritten since `older_than` (seconds since the epoch); their number."""
        selector = fs.FileSelector(f"{self._root}/{_PARTIAL}", allow_not_found=True)
        stale = [info.path for info in self._fs.get_file_info(selector) if info.mtime.timestamp() < older_than]
        for path in stale:
            self._remove(path)
        return len(stale)

    def _create_dir(self, path: str) -> None:
        """Make a directory that only this user can enter."""
        if not self._local:
            self._fs.create_dir(path, recursive=True)
            return
        missing = [each for each in (Path(path), *Path(path).parents) if not each.exists()]
        for each in reversed(missing):
            each.mkdir(0o700, exist_ok=True)

    def _path(self, key: str) -> str:
        return f"{self._root}/{_checked(key)}"

    def _remove(self, path: str) -> None:
        if self._fs.get_file_info(path).type is fs.FileType.File:
            self._fs.delete_file(path)


def split_lines(chunks: Iterable[bytes], longest: int = LINE_BYTES) -> Iterator[bytes]:
    """The lines of a text in chunks, without line ends; a line of more than `longest` bytes is cut off there."""
    rest = bytearray()
    for chunk in chunks:
        *lines, last = chunk.split(b"\n")
        for line in lines:
            rest += line[: longest - len(rest)]
            yield bytes(rest)
            rest.clear()
        rest += last[: longest - len(rest)]
    yield bytes(rest)


def _checked(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise ValueError(f"content key {key!r} is not a plain relative path")
    return key
