"""Lines of a JSONL body as rows to judge."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from reft_ray.core.conversation import Conversation, row_id
from reft_ray.rows.checks import Fault
from reft_ray.rows.reader import RowReader

_READER = RowReader(judging=True)
_EMPTY = Fault("", "empty_line", "the line is empty")


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a dataset: `number` counts lines from 0; `conversation` is None where there is an `error`."""

    number: int
    size: int
    id: str | None = None
    conversation: Conversation | None = None
    error: Fault | None = None


def parse_row(number: int, line: bytes) -> Row:
    """The row on a line, or its first fault."""
    text = line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
    found = _READER.read_line(text) if text.strip() else [_EMPTY]
    if isinstance(found, list):
        return Row(number, len(line), error=found[0])
    return Row(number, len(line), row_id(found.judged), found.judged)


async def lines(chunks: AsyncIterator[bytes], max_bytes: int) -> AsyncIterator[bytes | None]:
    """Lines without their line feeds, in order; None for a line longer than `max_bytes`, which is not kept."""
    held = bytearray()
    overlong = False
    async for chunk in chunks:
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            overlong = overlong or len(held) + end - start > max_bytes
            yield None if overlong else bytes(held) + chunk[start:end]
            held.clear()
            overlong = False
            start = end + 1
        overlong = overlong or len(held) + len(chunk) - start > max_bytes
        if overlong:
            held.clear()
        else:
            held += chunk[start:]
    if overlong:
        yield None
    elif held:
        yield bytes(held)


def overlong_row(number: int, max_bytes: int) -> Row:
    """The row for a line that was too long to keep."""
    return Row(number, max_bytes, error=Fault("", "row_too_long", f"the row has more than {max_bytes:,} bytes"))
