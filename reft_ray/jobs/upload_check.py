"""Format check of a training file during its upload."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import orjson

from reft_ray.jobs.content import LINE_BYTES
from reft_ray.jobs.errors import InvalidError
from reft_ray.rows.checks import Fault
from reft_ray.rows.first_bytes import HEAD_BYTES, Json, json_layout, not_data
from reft_ray.rows.reader import REPEATED_KEY, parse_row

_OTHER_FORMATS = (".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".gz", ".zst")


def checked(filename: str, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Pass the chunks through. Raises InvalidError at the first line of JSONL that is not a dictionary.

    Of other formats only the first bytes are checked. The job validates every row and reports all errors.
    """
    head: list[bytes] = []
    lines: _Lines | None = None
    size, checking = 0, not filename.lower().endswith(_OTHER_FORMATS)
    for chunk in chunks:
        size += len(chunk)
        if not checking:
            yield chunk
            continue
        if lines is not None:
            lines.feed(chunk)
            yield chunk
            continue
        head.append(chunk)
        if size >= HEAD_BYTES:
            lines = _lines_of(b"".join(head))
            checking = lines is not None
            yield from head
    if size == 0:
        raise InvalidError("The file is empty.", "file", "invalid_file_format")
    if not checking:
        return
    if lines is None:
        lines = _lines_of(b"".join(head))
        if lines is not None:
            lines.end()
        yield from head
    else:
        lines.end()


def _lines_of(head: bytes) -> _Lines | None:
    """The check of a file that begins so, fed with it; None where it is one JSON text."""
    if what := not_data(head):
        raise InvalidError(f"The file is {what}.", "file", "invalid_file_format")
    if json_layout(head) is Json.TEXT:
        return None
    lines = _Lines()
    lines.feed(head.removeprefix(b"\xef\xbb\xbf"))
    return lines


class _Lines:
    """Checks lines as they arrive in chunks."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._number = 0
        self._rows = 0

    def feed(self, chunk: bytes) -> None:
        """Check the lines that are complete now."""
        first, *others = chunk.split(b"\n")
        self._rest += first
        if others:
            self._check(bytes(self._rest))
            *complete, rest = others
            for line in complete:
                self._check(line)
            self._rest = bytearray(rest)
        if len(self._rest) > LINE_BYTES:
            number = self._number + 1
            raise InvalidError(f"Line {number} is longer than {LINE_BYTES:,} bytes.", "file", "invalid_file_format")
        if (begun := self._rest[:64].lstrip()) and not begun.startswith(b"{"):
            raise _not_a_dictionary(self._number + 1)

    def end(self) -> None:
        """Check the last line."""
        self._check(bytes(self._rest))
        if not self._rows:
            raise InvalidError("The file contains only blank lines.", "file", "invalid_file_format")

    def _check(self, line: bytes) -> None:
        self._number += 1
        if not line.strip():
            return
        self._rows += 1
        try:
            if type(orjson.loads(line)) is dict:
                return
        except orjson.JSONDecodeError:
            pass
        if fault := _fault_of(line):
            raise _not_a_dictionary(self._number, f" ({fault})")


def _not_a_dictionary(number: int, why: str = "") -> InvalidError:
    return InvalidError(
        "Expected file to have JSONL format, where every line is a JSON dictionary. "
        f"Line {number} is not a dictionary{why}.",
        "file",
        "invalid_file_format",
    )


def _fault_of(line: bytes) -> Fault | None:
    row = parse_row(line, lone_surrogates=True)
    # The job reports a repeated key with its place.
    return row if isinstance(row, Fault) and row.code != REPEATED_KEY.code else None
