"""Files of a project: records in SQL, bytes in the content store."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Select, delete, func, insert, or_, select, update

from reft_ray.jobs import ids
from reft_ray.jobs.audit import AuditLog
from reft_ray.jobs.content import ContentStore, Written
from reft_ray.jobs.database import Database
from reft_ray.jobs.errors import ConflictError, InvalidError, NotFoundError, QuotaError, TooLargeError
from reft_ray.jobs.job import TERMINAL
from reft_ray.jobs.paging import Page, page
from reft_ray.jobs.tables import files, jobs, uploads
from reft_ray.jobs.upload_check import checked

PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
RESULTS = "fine-tune-results"
EXPIRES_SECONDS = (3600, 2592000)
MAX_FILE_BYTES, MAX_PROJECT_BYTES = 512 << 20, 64 << 30
OPEN_UPLOAD = ("pending", "completing")
STALE_SECONDS = 86400.0
"""Age at which the record of an interrupted upload is removed."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file. It is deleted with the file `parent_id`, from which it was made."""

    id: str
    project_id: str
    filename: str
    purpose: str
    bytes: int
    sha256: str
    status: str
    status_details: str | None
    created_at: float
    expires_at: float | None
    parent_id: str | None


_COLUMNS = [files.c[name] for name in FileRecord.__dataclass_fields__]


class FileStore:
    """Create, list, read and delete files; `max_file_bytes` limits a file, `max_project_bytes` a project."""

    def __init__(
        self,
        database: Database,
        content: ContentStore,
        max_file_bytes: int = MAX_FILE_BYTES,
        max_project_bytes: int = MAX_PROJECT_BYTES,
    ) -> None:
        self.database = database
        self.content = content
        self.max_file_bytes = max_file_bytes
        self.max_project_bytes = max_project_bytes
        self.audit = AuditLog(database)

    def create(
        self,
        project_id: str,
        filename: str,
        purpose: str,
        chunks: Iterable[bytes],
        *,
        expires_after: int | None = None,
        parent_id: str | None = None,
        file_id: str | None = None,
        reserved: int | None = None,
        actor: Mapping[str, Any] | None = None,
    ) -> FileRecord:
        """Store a new file, or replace the file with this `file_id`. With an `actor`, the audit log gets an entry.

        `reserved`: the file's exact limit in bytes, for which quota was reserved beforehand.

        A training file's format is checked while it arrives. The record is written first, so there are never bytes
        without a record; it is listed once all bytes are stored.
        """
        check_lifetime(expires_after)
        now = self.database.now()
        file_id = file_id or ids.new_id(ids.FILE)
        writer = secrets.token_hex(32)  # in place of the hash: identifies the record as this call's
        with self.database.write() as connection:
            # First, so that a replaced file does not count against the quota.
            connection.execute(delete(files).where(files.c.id == file_id))
            most = min(self.max_file_bytes, self.remaining(connection, project_id)) if reserved is None else reserved
            connection.execute(
                insert(files).values(
                    id=file_id,
                    project_id=project_id,
                    filename=safe_name(filename),
                    purpose=purpose,
                    bytes=0,
                    sha256=writer,
                    status="uploaded",
                    created_at=now,
                    expires_at=None if expires_after is None else now + expires_after,
                    parent_id=parent_id,
                )
            )
        if purpose == "fine-tune":
            chunks = checked(filename, chunks)
        try:
            written = self.content.write(_key(project_id, file_id), chunks, most)
            with self.database.write() as connection:
                if reserved is None and written.bytes > (left := self._left(connection, project_id)):
                    # Concurrent writers were given the same quota.
                    raise QuotaError(
                        f"The project's quota has {left} bytes left, not {written.bytes}; delete files.", "bytes"
                    )
                connection.execute(
                    update(files)
                    .where(files.c.id == file_id)
                    .values(bytes=written.bytes, sha256=written.sha256, status="processed")
                )
                if actor is not None:
                    self.audit.append_in(connection, "file.created", actor, project_id, {"id": file_id})
        except BaseException:
            with self.database.write() as connection:
                # Unless another call has replaced the record meanwhile.
                statement = delete(files).where(files.c.id == file_id, files.c.sha256 == writer)
                if connection.execute(statement).rowcount:
                    self.content.delete(_key(project_id, file_id))
            raise
        return self.get(file_id, project_id)

    def get(self, file_id: str, project_id: str) -> FileRecord:
        """Get a record. Raises NotFoundError, also for another project's file."""
        with self.database.read() as connection:
            row = connection.execute(self._visible(project_id).where(files.c.id == file_id)).first()
        if row is None:
            raise NotFoundError("File object", file_id)
        return FileRecord(*row)

    def list(
        self,
        project_id: str,
        *,
        purpose: str | None = None,
        after: str | None = None,
        limit: int = 10000,
        ascending: bool = False,
    ) -> Page[FileRecord]:
        """List a project's files."""
        query = self._visible(project_id)
        if purpose is not None:
            query = query.where(files.c.purpose == purpose)
        with self.database.read() as connection:
            return page(
                connection, files, query, lambda row: FileRecord(*row), after=after, limit=limit, ascending=ascending
            )

    def read(self, file_id: str, project_id: str) -> Iterator[bytes]:
        """Read the bytes in chunks. Raises NotFoundError, also where the bytes are gone, before the first chunk."""
        self.get(file_id, project_id)
        try:
            return self.content.read(_key(project_id, file_id))
        except FileNotFoundError:
            raise NotFoundError("File content", file_id) from None

    def read_range(self, file_id: str, project_id: str, offset: int, size: int) -> bytes:
        """Read `size` bytes from `offset`. Raises NotFoundError where the file is deleted or expired."""
        self.get(file_id, project_id)
        try:
            return self.content.read_range(_key(project_id, file_id), offset, size)
        except FileNotFoundError:
            raise NotFoundError("File object", file_id) from None

    def uri(self, file_id: str, project_id: str) -> str:
        """The URI of the bytes."""
        self.get(file_id, project_id)
        return self.content.uri(_key(project_id, file_id))

    def rewrite(self, record: FileRecord, chunks: Iterable[bytes]) -> Written:
        """Replace the bytes of a file, at once; its record keeps the hash of the old ones."""
        return self.content.write(_key(record.project_id, record.id), chunks)

    def delete(self, file_id: str, project_id: str, actor: Mapping[str, Any] | None = None) -> None:
        """Delete a file and the files made from it. Raises ConflictError while a job needs it."""
        with self.database.write() as connection:
            # Locked first: a job that is being created has locked it too, so one of the two sees the other.
            if not self._locked(connection, file_id, project_id):
                raise NotFoundError("File object", file_id)
            running = connection.execute(_users().where(files.c.id == file_id)).scalar()
            if running is not None:
                raise ConflictError(f"File {file_id} is used by job {running}; cancel the job first.", "file_in_use")
            connection.execute(
                update(files)
                .where(or_(files.c.id == file_id, files.c.parent_id == file_id))
                .values(deleted_at=self.database.now())
            )
            if actor is not None:
                self.audit.append_in(connection, "file.deleted", actor, project_id, {"id": file_id})
        self.sweep()

    def check_usable_in(self, connection: Connection, project_id: str, training: str, validation: str | None) -> None:
        """Lock the files of a job that is created in this transaction. Raises InvalidError for one it cannot use."""
        for param, file_id in (("training_file", training), ("validation_file", validation)):
            if file_id is None:
                continue
            purpose = self._locked(connection, file_id, project_id)
            if purpose is None:
                raise InvalidError(f"invalid {param}: {file_id[:64]}", param, f"invalid_{param}")
            if purpose != "fine-tune":
                raise InvalidError(
                    f"File {file_id} has purpose '{purpose}'; a {param} needs 'fine-tune'.", param, f"invalid_{param}"
                )

    def _locked(self, connection: Connection, file_id: str, project_id: str) -> str | None:
        """Lock a visible file until the transaction ends; its purpose, or None where there is none."""
        query = self._visible(project_id).with_only_columns(files.c.purpose).where(files.c.id == file_id)
        purpose: str | None = connection.execute(query.with_for_update()).scalar()
        return purpose

    def sweep(self) -> int:
        """Remove deleted, expired and interrupted files; returns their number."""
        now = self.database.now()
        gone = or_(
            files.c.deleted_at.is_not(None),
            (files.c.expires_at < now) & ~_users().exists(),
            (files.c.status == "uploaded") & (files.c.created_at < now - STALE_SECONDS),
        )
        removed = 0
        with self.database.read() as connection:
            expired = select(files.c.id).where(gone)
            rows = connection.execute(
                select(files.c.id, files.c.project_id, files.c.parent_id).where(
                    or_(gone, files.c.parent_id.in_(expired))
                )
            ).all()
        for row in rows:
            with self.database.write() as connection:
                # Asked again with the row locked: a job may have come to need it.
                connection.execute(select(files.c.id).where(files.c.id == row.id).with_for_update())
                parents = [row.parent_id] if row.parent_id else []
                still = select(files.c.id).where(gone, files.c.id.in_([row.id, *parents]))
                orphaned = parents and connection.execute(_with_id(row.parent_id)).first() is None
                if not orphaned and connection.execute(still).first() is None:
                    continue
                connection.execute(update(files).where(files.c.id == row.id).values(deleted_at=now))
            self.content.delete(_key(row.project_id, row.id))
            with self.database.write() as connection:
                connection.execute(delete(files).where(files.c.id == row.id))
            removed += 1
        return removed

    def check_room(self, project_id: str, size: int) -> None:
        """Raise what `create` would for a file of this size, before its bytes are read."""
        if size > self.max_file_bytes:
            raise TooLargeError(f"The content is larger than the allowed {self.max_file_bytes} bytes.")
        with self.database.read() as connection:
            left = self.remaining(connection, project_id)
        if size > left:
            raise QuotaError(f"The project's quota has {left} bytes left, not {size}; delete files.", "bytes")

    def remaining(self, connection: Connection, project_id: str) -> int:
        """Bytes left of the project's quota; open uploads count fully. Raises QuotaError where none are left."""
        left = self._left(connection, project_id)
        if left <= 0:
            raise QuotaError(
                f"The project's files and open uploads fill their quota of {self.max_project_bytes} bytes; "
                "delete some.",
                "bytes",
            )
        return left

    def _left(self, connection: Connection, project_id: str) -> int:
        self.database.serialize(connection, f"files of {project_id}")
        stored = select(func.coalesce(func.sum(files.c.bytes), 0)).where(files.c.project_id == project_id)
        pending = select(func.coalesce(func.sum(uploads.c.bytes), 0)).where(
            uploads.c.project_id == project_id, uploads.c.status.in_(OPEN_UPLOAD)
        )
        return self.max_project_bytes - sum(int(connection.execute(each).scalar_one()) for each in (stored, pending))

    def _visible(self, project_id: str) -> Select[Any]:
        return select(*_COLUMNS).where(
            files.c.project_id == project_id,
            files.c.status != "uploaded",
            files.c.deleted_at.is_(None),
            or_(files.c.expires_at.is_(None), files.c.expires_at > self.database.now(), _users().exists()),
        )


def job_key(project_id: str, job_id: str) -> str:
    """The directory of a job's artefacts in the content store."""
    return f"{project_id}/jobs/{job_id}"


def scratch_key(project_id: str, job_id: str) -> str:
    """The directory of a job's temporary artefacts, such as its copy of the kept rows."""
    return f"{job_key(project_id, job_id)}/scratch"


def safe_name(filename: str) -> str:
    """The last part of a path, without control characters; only for display."""
    name = re.sub(r"[\x00-\x1f\x7f]", "", re.split(r"[/\\]", filename)[-1]).strip()
    return name[:512] or "upload"


def check_lifetime(seconds: int | None) -> None:
    """Raise InvalidError for a lifetime outside of OpenAI's bounds."""
    low, high = EXPIRES_SECONDS
    if seconds is not None and not low <= seconds <= high:
        raise InvalidError(f"expires_after.seconds must be from {low} to {high}.", "expires_after")


def _with_id(file_id: str) -> Select[Any]:
    return select(files.c.id).where(files.c.id == file_id)


def _users() -> Select[Any]:
    """The unfinished jobs that use a file; it is not deleted and does not expire before they end."""
    return select(jobs.c.id).where(
        jobs.c.project_id == files.c.project_id,
        jobs.c.status.not_in(TERMINAL),
        or_(jobs.c.training_file == files.c.id, jobs.c.validation_file == files.c.id),
    )


def _key(project_id: str, file_id: str) -> str:
    return f"{project_id}/files/{file_id}"
