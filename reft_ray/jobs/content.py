"""Bytes at any `pyarrow.fs` URI (a directory, s3://, gs://, abfss://), streamed with a size limit and a hash."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
from pyarrow import fs

from reft_ray.core.errors import UsageError
from reft_ray.jobs.errors import TooLargeError

CHUNK_BYTES = 1 << 20

_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")


@dataclass(frozen=True, slots=True)
class Written:
    """Size and hash of written bytes."""

    bytes: int
    sha256: str


class ContentStore:
    """Named byte strings below one URI. Raises ValueError for a key that could leave it."""

    def __init__(self, uri: str) -> None:
        try:
            self._fs, self._root = fs.FileSystem.from_uri(uri)
        except (pa.ArrowInvalid, ValueError) as error:
            raise UsageError(
                f"file store {uri!r}: {error}; use an absolute path or a URI such as s3://bucket"
            ) from None
        self._fs.create_dir(self._root, recursive=True)
        self._uri = uri.rstrip("/")

    def uri(self, key: str) -> str:
        """The URI of a key or of a directory of keys."""
        return f"{self._uri}/{_checked(key)}"

    def write(self, key: str, chunks: Iterable[bytes], limit: int | None = None) -> Written:
        """Store the chunks under a key atomically. Raises TooLargeError above `limit` bytes."""
        path = self._path(key)
        self._fs.create_dir(path.rpartition("/")[0], recursive=True)
        temporary = f"{path}.{secrets.token_hex(4)}.part"
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

    def exists(self, key: str) -> bool:
        """Whether a key has bytes."""
        return self._fs.get_file_info(self._path(key)).type is fs.FileType.File

    def _path(self, key: str) -> str:
        return f"{self._root}/{_checked(key)}"

    def _remove(self, path: str) -> None:
        if self._fs.get_file_info(path).type is fs.FileType.File:
            self._fs.delete_file(path)


def split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a text in chunks, without line ends."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    yield rest


def _checked(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise ValueError(f"content key {key!r} is not a plain relative path")
    return key
