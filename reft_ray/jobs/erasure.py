"""Erase the rows of one person from a project's files: training files, withheld rows, samples and kept rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson
from sqlalchemy import select, update

from reft_ray.jobs.audit import AuditLog
from reft_ray.jobs.content import CHUNK_BYTES
from reft_ray.jobs.errors import ConflictError, InvalidError
from reft_ray.jobs.files import RESULTS, FileRecord, FileStore
from reft_ray.jobs.job import TERMINAL
from reft_ray.jobs.tables import files as file_rows
from reft_ray.jobs.tables import jobs, models
from reft_ray.rows.first_bytes import HEAD_BYTES, Json, json_layout

LEAST_CHARACTERS = 3
_ERASED = b'{"messages":[],"erased":true}'


@dataclass(frozen=True, slots=True)
class Erasure:
    """What was erased, or would be.

    `files` has the erased rows by file. `unread` are files of rows that are not JSONL: delete those that name the
    subject. `models` were trained on files with erased rows; their weights are not changed.
    """

    rows: int
    files: Mapping[str, int]
    unread: tuple[str, ...]
    models: tuple[str, ...]


def erase(store: FileStore, project_id: str, subject: str, actor: Mapping[str, Any], dry_run: bool = False) -> Erasure:
    """Erase every row of the project in which a text contains `subject`, exactly; with `dry_run` only count them.

    A row is overwritten where it is, so that line numbers and the places of other rows stay; a training file has a
    blank line there. Raises InvalidError for a short subject, ConflictError while an unfinished job uses such a file.
    """
    if len(subject.strip()) < LEAST_CHARACTERS:
        raise InvalidError(f"subject: name at least {LEAST_CHARACTERS} characters that only its rows have.", "subject")
    found: dict[str, int] = {}
    unread, records = [], {}
    for record in _files(store, project_id):
        if not _has_lines(store, record):
            if record.purpose != RESULTS:
                unread.append(record.id)
            continue
        rows = sum(_names(line, subject) for line in _lines(store, record))
        if rows:
            found[record.id], records[record.id] = rows, record
    if found and not dry_run:
        _check_unused(store, records.values())
        for record in records.values():
            _overwrite(store, record, subject)
        with store.database.write() as connection:
            # The subject itself is not recorded.
            AuditLog(store.database).append_in(connection, "rows.erased", actor, project_id, {"files": found})
    return Erasure(sum(found.values()), found, tuple(unread), _trained_on(store, records.values()))


def _files(store: FileStore, project_id: str) -> Iterator[FileRecord]:
    after = None
    while True:
        page = store.list(project_id, after=after, limit=1000)
        yield from page.items
        if not page.has_more:
            return
        after = page.items[-1].id


def _has_lines(store: FileStore, record: FileRecord) -> bool:
    if record.purpose == RESULTS:
        return record.filename.endswith(".jsonl")
    head = store.read_range(record.id, record.project_id, 0, HEAD_BYTES)
    return json_layout(head) is Json.LINES


def _lines(store: FileStore, record: FileRecord) -> Iterator[bytes]:
    """The lines with their ends, in pieces of a chunk at most where there are none."""
    rest = b""
    for chunk in store.read(record.id, record.project_id):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (line + b"\n" for line in whole)
    if rest:
        yield rest


def _names(line: bytes, subject: str) -> bool:
    # Only a line with an escape may hold the subject in other bytes than its own.
    if subject.encode() not in line and b"\\" not in line:
        return False
    try:
        return any(subject in text for text in _texts(orjson.loads(line)))
    except orjson.JSONDecodeError:
        return subject.encode() in line


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _overwrite(store: FileStore, record: FileRecord, subject: str) -> None:
    def chunks() -> Iterator[bytes]:
        held = bytearray()
        for line in _lines(store, record):
            held += _blank(line, record.purpose) if _names(line, subject) else line
            if len(held) >= CHUNK_BYTES:
                yield bytes(held)
                held.clear()
        yield bytes(held)

    written = store.rewrite(record, chunks())
    with store.database.write() as connection:
        connection.execute(update(file_rows).where(file_rows.c.id == record.id).values(sha256=written.sha256))


def _blank(line: bytes, purpose: str) -> bytes:
    """As many bytes without the row; those who review read the rows of result files by their place."""
    text = line.removesuffix(b"\n")
    shown = _ERASED if purpose == RESULTS and len(text) >= len(_ERASED) else b""
    return shown.ljust(len(text)) + line[len(text) :]


def _check_unused(store: FileStore, records: Iterable[FileRecord]) -> None:
    needed = {record.parent_id if record.purpose == RESULTS else record.id: record.id for record in records}
    needed |= {record.id: record.id for record in records}
    query = select(jobs.c.id, jobs.c.training_file, jobs.c.validation_file).where(
        jobs.c.status.not_in(TERMINAL), jobs.c.training_file.in_(needed) | jobs.c.validation_file.in_(needed)
    )
    with store.database.read() as connection:
        row = connection.execute(query).first()
    if row is not None:
        raise ConflictError(
            f"Job {row.id} uses rows of this subject; cancel it, or erase them once it has ended.", "file_in_use"
        )


def _trained_on(store: FileStore, records: Iterable[FileRecord]) -> tuple[str, ...]:
    names = {record.parent_id or record.id for record in records} | {record.id for record in records}
    query = (
        select(models.c.id)
        .join(jobs, jobs.c.id == models.c.job_id)
        .where(jobs.c.training_file.in_(names), models.c.deleted_at.is_(None))
        .order_by(models.c.created_at)
    )
    with store.database.read() as connection:
        return tuple(connection.execute(query).scalars())
