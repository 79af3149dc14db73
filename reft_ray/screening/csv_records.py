"""Where CSV records end: a quote opens a field only at its start, so that a text such as 5" is a text."""

from __future__ import annotations

import codecs
from collections.abc import Iterator

DELIMITERS = ",\t;"


def delimiter_of(header: bytes) -> bytes:
    """The delimiter of a file, by the first line of its header."""
    first = header.partition(b"\n")[0]
    return max((mark.encode() for mark in DELIMITERS), key=first.count)


class Quotes:
    """Follows quotes from line to line; `open` says whether the next line continues a quoted field."""

    def __init__(self, delimiter: bytes) -> None:
        self._delimiter = delimiter
        self.open = False

    def feed(self, line: bytes) -> bool:
        """Take the next line; whether a record ends with it."""
        if b'"' in line:
            self.open = self._open_after(line)
        return not self.open

    def _open_after(self, line: bytes) -> bool:
        at = 0
        while True:
            if self.open or line.startswith(b'"', at):
                at += not self.open
                self.open = False
                while True:
                    at = line.find(b'"', at) + 1
                    if at == 0:
                        return True
                    if not line.startswith(b'"', at):
                        break
                    at += 1
            at = line.find(self._delimiter, at) + 1
            if at == 0:
                return False


def csv_records(data: bytes, first: int, delimiter: bytes = b",") -> Iterator[tuple[int, bytes]]:
    """CSV records with the number of their first line; quoted fields may contain line feeds."""
    quotes, held = Quotes(delimiter), []
    lines = data.split(b"\n")
    for number, line in enumerate(lines, start=first):
        held.append(line)
        if quotes.feed(line):
            record = b"\n".join(held)
            if record and not record.isspace():
                yield number - len(held) + 1, record
            held = []
    if held and (record := b"\n".join(held).rstrip(b"\n")):
        yield first + len(lines) - len(held), record


def without_mark(line: bytes) -> bytes:
    """The first line of a file without its byte-order mark, after which a field starts."""
    return line.removeprefix(codecs.BOM_UTF8)
