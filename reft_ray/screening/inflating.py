"""Compressed files read within a budget: a small file must not give days of rows."""

from __future__ import annotations

from types import TracebackType

import pyarrow as pa

from reft_ray.core.errors import UsageError

FREE_BYTES = 64 << 20
MAX_RATIO = 64
"""Chat rows compress by three to twenty; those of one template by more, but not by this much."""
FREE_ROWS = 1_000_000
BYTES_PER_ROW = 4
"""Stored bytes that a row beyond the free ones must have, compressed or not: blank lines have less."""


class InflatedStream:
    """A stream of decompressed bytes that raises UsageError once there are too many for the file's size."""

    def __init__(self, stored: pa.NativeFile, compression: str, name: str, size: int) -> None:
        self._stream = pa.CompressedInputStream(stored, compression)
        self._name = name
        self._most = FREE_BYTES + MAX_RATIO * size
        self._read = 0

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end."""
        data = bytes(self._stream.read(size))
        self._read += len(data)
        if self._read > self._most:
            raise UsageError(
                f"{self._name}: more than {self._most:,} bytes once decompressed, {MAX_RATIO} times its size; "
                "upload it uncompressed or in parts"
            )
        return data

    def close(self) -> None:
        """Close the stream and the file under it."""
        self._stream.close()

    def __enter__(self) -> InflatedStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def check_rows(rows: int, size: int, name: str) -> None:
    """Raise UsageError for a file with more rows (lines, in text) than its size can mean."""
    most = FREE_ROWS + size // BYTES_PER_ROW
    if rows > most:
        raise UsageError(f"{name}: {rows:,} rows in {size:,} bytes, at most {most:,} are read; remove empty lines")
