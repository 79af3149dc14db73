"""Uploads in parts: for files that are too large, or networks too poor, for one request."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from sqlalchemy import func, insert, select, update

from reft_ray.jobs import ids
from reft_ray.jobs.errors import ConflictError, InvalidError, NotFoundError, TooLargeError
from reft_ray.jobs.files import FileRecord, FileStore, safe_name
from reft_ray.jobs.tables import upload_parts, uploads

LIFETIME_SECONDS = 3600.0
PART_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Upload:
    """An upload that is under way (`pending`) or over (`completed`, `cancelled`, `expired`)."""

    id: str
    project_id: str
    filename: str
    purpose: str
    bytes: int
    mime_type: str
    status: str
    created_at: float
    expires_at: float
    file_expires_after: int | None
    file_id: str | None


_COLUMNS = [uploads.c[name] for name in Upload.__dataclass_fields__]


class UploadStore:
    """Uploads beside the files that they become."""

    def __init__(self, files: FileStore, max_bytes: int = 8 << 30) -> None:
        self.files = files
        self.database = files.database
        self.max_bytes = max_bytes

    def create(
        self, project_id: str, filename: str, purpose: str, size: int, mime_type: str, expires_after: int | None = None
    ) -> Upload:
        """Open an upload of exactly `size` bytes."""
        if size > self.max_bytes:
            raise TooLargeError(f"An upload may have {self.max_bytes} bytes, not {size}.")
        now, upload_id = self.database.now(), ids.new_id(ids.UPLOAD)
        with self.database.write() as connection:
            connection.execute(
                insert(uploads).values(
                    id=upload_id,
                    project_id=project_id,
                    filename=safe_name(filename),
                    purpose=purpose,
                    bytes=size,
                    mime_type=mime_type,
                    status="pending",
                    created_at=now,
                    expires_at=now + LIFETIME_SECONDS,
                    file_expires_after=expires_after,
                )
            )
        return self.get(upload_id, project_id)

    def get(self, upload_id: str, project_id: str) -> Upload:
        """The upload; a pending one whose time is over is `expired`."""
        query = select(*_COLUMNS).where(uploads.c.id == upload_id, uploads.c.project_id == project_id)
        with self.database.read() as connection:
            row = connection.execute(query).first()
        if row is None:
            raise NotFoundError("Upload", upload_id)
        upload = Upload(*row)
        if upload.status == "pending" and upload.expires_at <= self.database.now():
            self._close(upload, "expired")
            return self.get(upload_id, project_id)
        return upload

    def add_part(self, upload_id: str, project_id: str, chunks: Iterable[bytes]) -> tuple[str, float]:
        """Store a part; its id and creation time."""
        upload = self._pending(upload_id, project_id)
        part_id, now = ids.new_id(ids.PART), self.database.now()
        sizes = select(func.coalesce(func.sum(upload_parts.c.bytes), 0)).where(upload_parts.c.upload_id == upload_id)
        with self.database.read() as connection:
            room = self.max_bytes - int(connection.execute(sizes).scalar_one())
        written = self.files.content.write(_key(upload, part_id), chunks, min(PART_BYTES, room))
        with self.database.write() as connection:
            connection.execute(
                insert(upload_parts).values(
                    id=part_id, upload_id=upload_id, bytes=written.bytes, sha256=written.sha256, created_at=now
                )
            )
        return part_id, now

    def complete(
        self, upload_id: str, project_id: str, part_ids: Sequence[str], md5: str | None = None
    ) -> tuple[Upload, FileRecord]:
        """Join the parts, in the order given, into a file; asking again for a finished upload gives the same file."""
        upload = self.get(upload_id, project_id)
        if upload.status == "completed" and upload.file_id is not None:
            return upload, self.files.get(upload.file_id, project_id)
        upload = self._pending(upload_id, project_id)
        self._check_parts(upload, part_ids)
        digest = hashlib.md5(usedforsecurity=False)
        record = self.files.create(
            project_id,
            upload.filename,
            upload.purpose,
            self._joined(upload, part_ids, digest),
            expires_after=upload.file_expires_after,
            file_id=ids.derived_id(ids.FILE, upload_id),
            limit=upload.bytes,
        )
        if md5 is not None and md5.lower() != digest.hexdigest():
            self.files.delete(record.id, project_id)
            raise InvalidError("md5 does not match the joined parts; nothing was stored.", "md5")
        self._close(upload, "completed", record.id)
        return self.get(upload_id, project_id), record

    def cancel(self, upload_id: str, project_id: str) -> Upload:
        """Give up an upload."""
        self._close(self._pending(upload_id, project_id), "cancelled")
        return self.get(upload_id, project_id)

    def sweep(self) -> int:
        """Close the uploads whose time is over; their number."""
        query = select(*_COLUMNS).where(uploads.c.status == "pending", uploads.c.expires_at <= self.database.now())
        with self.database.read() as connection:
            late = [Upload(*row) for row in connection.execute(query)]
        for upload in late:
            self._close(upload, "expired")
        return len(late)

    def _pending(self, upload_id: str, project_id: str) -> Upload:
        upload = self.get(upload_id, project_id)
        if upload.status != "pending":
            raise ConflictError(f"Upload {upload_id} is {upload.status}.", "upload_not_pending")
        return upload

    def _check_parts(self, upload: Upload, part_ids: Sequence[str]) -> None:
        query = select(upload_parts.c.id, upload_parts.c.bytes).where(upload_parts.c.upload_id == upload.id)
        with self.database.read() as connection:
            sizes = {row.id: row.bytes for row in connection.execute(query)}
        for part_id in part_ids:
            if part_id not in sizes:
                raise InvalidError(f"Upload {upload.id} has no part {part_id}.", "part_ids")
        total = sum(sizes[part_id] for part_id in part_ids)
        if total != upload.bytes:
            raise InvalidError(f"The parts have {total} bytes, the upload was opened for {upload.bytes}.", "part_ids")

    def _joined(self, upload: Upload, part_ids: Sequence[str], digest: hashlib._Hash) -> Iterator[bytes]:
        for part_id in part_ids:
            for chunk in self.files.content.read(_key(upload, part_id)):
                digest.update(chunk)
                yield chunk

    def _close(self, upload: Upload, status: str, file_id: str | None = None) -> None:
        with self.database.write() as connection:
            connection.execute(
                update(uploads)
                .where(uploads.c.id == upload.id, uploads.c.status == "pending")
                .values(status=status, file_id=file_id)
            )
        self.files.content.delete_tree(f"{upload.project_id}/uploads/{upload.id}")


def _key(upload: Upload, part_id: str) -> str:
    return f"{upload.project_id}/uploads/{upload.id}/{part_id}"
