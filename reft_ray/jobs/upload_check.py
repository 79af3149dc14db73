"""Format check of a training file during its upload."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from reft_ray.jobs.errors import InvalidError
from reft_ray.rows.checks import Fault
from reft_ray.rows.first_bytes import HEAD_BYTES, Json, json_layout, not_data
from reft_ray.rows.reader import REPEATED_KEY, parse_row

_OTHER_FORMATS = (".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".gz", ".zst")


def checked(filename: str, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Pass the chunks through. Raises InvalidError when the start of the file is neither JSONL nor a JSON array.

    Only the start is checked: the job validates every row and reports all errors.
    """
    head, held = b"", []
    checking = not filename.lower().endswith(_OTHER_FORMATS)
    size = 0
    for chunk in chunks:
        size += len(chunk)
        if not checking:
            yield chunk
            continue
        head += chunk
        held.append(chunk)
        if len(head) >= HEAD_BYTES:
            _check(head, complete=False)
            checking = False
            yield from held
    if size == 0:
        raise InvalidError("The file is empty.", "file", "invalid_file_format")
    if checking:
        _check(head, complete=True)
        yield from held


def _check(head: bytes, complete: bool) -> None:
    if what := not_data(head):
        raise InvalidError(f"The file is {what}.", "file", "invalid_file_format")
    if json_layout(head) is Json.TEXT:
        return
    lines = head.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if not complete:
        *lines, cut = lines
        if cut.strip() and not cut.lstrip().startswith(b"{"):
            raise _not_a_dictionary(len(lines) + 1)
    if complete and not any(line.strip() for line in lines):
        raise InvalidError("The file contains only blank lines.", "file", "invalid_file_format")
    for number, line in enumerate(lines, 1):
        if line.strip() and (fault := _fault_of(line)):
            raise _not_a_dictionary(number, f" ({fault})")


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
