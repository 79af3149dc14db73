"""Multipart uploads, for large files and unreliable networks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import delete, func, insert, select, update

from reft_ray.jobs import ids
from reft_ray.jobs.content import Written
from reft_ray.jobs.errors import ConflictError, InvalidError, NotFoundError, QuotaError, TooLargeError
from reft_ray.jobs.files import OPEN_UPLOAD, FileRecord, FileStore, check_lifetime, safe_name
from reft_ray.jobs.tables import upload_parts, uploads

LIFETIME_SECONDS = 3600.0
PART_BYTES = 64 << 20
MAX_PARTS = 10_000
JOIN_SECONDS = 900.0
"""After this time, a join that has not finished is presumed lost and may be started again."""


@dataclass(frozen=True, slots=True)
class Upload:
    """An upload, open (`pending`, then `completing`) or closed (`completed`, `cancelled`, `expired`)."""

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
    """Create, fill, complete and cancel uploads."""

    def __init__(self, files: FileStore, max_bytes: int = 8 << 30) -> None:
        self.files = files
        self.database = files.database
        self.max_bytes = max_bytes

    def create(
        self, project_id: str, filename: str, purpose: str, size: int, mime_type: str, expires_after: int | None = None
    ) -> Upload:
        """Create an upload of exactly `size` bytes, which count as used until it is closed."""
        check_lifetime(expires_after)
        if size > self.max_bytes:
            raise TooLargeError(f"An upload may have up to {self.max_bytes} bytes, not {size}.")
        now, upload_id = self.database.now(), ids.new_id(ids.UPLOAD)
        with self.database.write() as connection:
            left = self.files.remaining(connection, project_id)
            if size > left:
                raise QuotaError(
                    f"The project's quota has {left} bytes left, not {size}; delete files or cancel uploads.", "bytes"
                )
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
        """Get an upload; closes it as `expired` when its time is over. Raises NotFoundError."""
        query = select(*_COLUMNS).where(uploads.c.id == upload_id, uploads.c.project_id == project_id)
        with self.database.read() as connection:
            row = connection.execute(query).first()
        if row is None:
            raise NotFoundError("Upload", upload_id)
        upload = Upload(*row)
        if upload.status in OPEN_UPLOAD and upload.expires_at <= self.database.now():
            self._close(upload, "expired")
            return self.get(upload_id, project_id)
        return upload

    def check_room(self, upload_id: str, project_id: str, size: int) -> None:
        """Raise what `add_part` would for a part of this size, before its bytes are read."""
        upload = self._pending(upload_id, project_id)
        with self.database.read() as connection:
            parts = select(func.count()).where(upload_parts.c.upload_id == upload.id)
            count = connection.execute(parts).scalar_one()
        if count >= MAX_PARTS:
            raise TooLargeError(f"An upload may have up to {MAX_PARTS} parts.")
        if size > upload.bytes:
            raise TooLargeError(f"The part has {size} bytes, the whole upload {upload.bytes}.")

    def add_part(self, upload_id: str, project_id: str, chunks: Iterable[bytes]) -> tuple[str, float]:
        """Store a part; returns its id and creation time. Sending the same bytes again returns the same part."""
        upload = self._pending(upload_id, project_id)
        part_id, now = ids.new_id(ids.PART), self.database.now()
        key = _key(upload, part_id)
        written = self.files.content.write(key, chunks, min(PART_BYTES, upload.bytes))
        kept: tuple[str, float] | None = None
        try:
            kept = self._keep(upload, part_id, written, now)
        finally:
            if kept != (part_id, now):
                self.files.content.delete(key)
        return kept

    def complete(
        self,
        upload_id: str,
        project_id: str,
        part_ids: Sequence[str],
        md5: str | None = None,
        actor: Mapping[str, Any] | None = None,
    ) -> tuple[Upload, FileRecord]:
        """Join the parts, in the given order, into a file; repeating it returns the same file."""
        upload = self.get(upload_id, project_id)
        if upload.status == "completed" and upload.file_id is not None:
            return upload, self.files.get(upload.file_id, project_id)
        claim = self._claim(upload)
        try:
            self._check_parts(upload, part_ids)
            record = self.files.create(
                project_id,
                upload.filename,
                upload.purpose,
                self._joined(upload, part_ids, md5),
                expires_after=upload.file_expires_after,
                file_id=ids.derived_id(ids.FILE, upload_id),
                reserved=upload.bytes,
                actor=actor,
            )
        except BaseException:
            self._move(claim, status="pending", expires_at=upload.expires_at)
            raise
        if not self._close(claim, "completed", record.id):
            raise _refusal(self.get(upload_id, project_id))
        return self.get(upload_id, project_id), record

    def cancel(self, upload_id: str, project_id: str) -> Upload:
        """Cancel an upload. Raises ConflictError unless it is pending."""
        upload = self._pending(upload_id, project_id)
        if not self._close(upload, "cancelled"):
            raise _refusal(self.get(upload_id, project_id))
        return self.get(upload_id, project_id)

    def sweep(self) -> int:
        """Close expired uploads; returns their number."""
        query = select(*_COLUMNS).where(uploads.c.status.in_(OPEN_UPLOAD), uploads.c.expires_at <= self.database.now())
        with self.database.read() as connection:
            late = [Upload(*row) for row in connection.execute(query)]
        for upload in late:
            self._close(upload, "expired")
        return len(late)

    def _keep(self, upload: Upload, part_id: str, written: Written, now: float) -> tuple[str, float]:
        with self.database.write() as connection:
            # This lock excludes other parts, and a request that closes the upload.
            status = select(uploads.c.status).where(uploads.c.id == upload.id).with_for_update()
            if connection.execute(status).scalar_one() != "pending":
                raise ConflictError(f"Upload {upload.id} was closed before the part was stored.", "upload_not_pending")
            mine = upload_parts.c.upload_id == upload.id
            # A client that lost the response sends again, and two copies of a part would not fit.
            copies = mine & (upload_parts.c.sha256 == written.sha256)
            same = select(upload_parts.c.id, upload_parts.c.created_at).where(copies)
            if (stored := connection.execute(same).first()) is not None:
                return stored.id, stored.created_at
            total = select(func.coalesce(func.sum(upload_parts.c.bytes), 0)).where(mine)
            left = upload.bytes - int(connection.execute(total).scalar_one())
            if written.bytes > left:
                raise TooLargeError(f"The part has {written.bytes} bytes; the upload has {left} left.")
            connection.execute(
                insert(upload_parts).values(
                    id=part_id, upload_id=upload.id, bytes=written.bytes, sha256=written.sha256, created_at=now
                )
            )
        return part_id, now

    def _pending(self, upload_id: str, project_id: str) -> Upload:
        upload = self.get(upload_id, project_id)
        if upload.status != "pending":
            raise _refusal(upload)
        return upload

    def _claim(self, upload: Upload) -> Upload:
        """Become the only request that joins the parts. Raises ConflictError for all others."""
        now = self.database.now()
        lost = upload.status == "completing" and upload.expires_at <= now + LIFETIME_SECONDS - JOIN_SECONDS
        claim = replace(upload, status="completing", expires_at=now + LIFETIME_SECONDS)
        if upload.status != "pending" and not lost:
            raise _refusal(upload)
        if not self._move(upload, status=claim.status, expires_at=claim.expires_at):
            raise _refusal(self.get(upload.id, upload.project_id))
        return claim

    def _check_parts(self, upload: Upload, part_ids: Sequence[str]) -> None:
        query = select(upload_parts.c.id, upload_parts.c.bytes).where(upload_parts.c.upload_id == upload.id)
        with self.database.read() as connection:
            sizes = {row.id: row.bytes for row in connection.execute(query)}
        for part_id in part_ids:
            if part_id not in sizes:
                raise InvalidError(f"Upload {upload.id} has no part {part_id}.", "part_ids")
        total = sum(sizes[part_id] for part_id in part_ids)
        if total != upload.bytes:
            raise InvalidError(f"The parts have {total} bytes, the upload was created for {upload.bytes}.", "part_ids")

    def _joined(self, upload: Upload, part_ids: Sequence[str], md5: str | None) -> Iterator[bytes]:
        digest = hashlib.md5(usedforsecurity=False)
        for part_id in part_ids:
            for chunk in self.files.content.read(_key(upload, part_id)):
                digest.update(chunk)
                yield chunk
        # Here, because an error within the stream leaves nothing stored.
        if md5 is not None and md5.lower() != digest.hexdigest():
            raise InvalidError("md5 does not match the joined parts; nothing was stored.", "md5")

    def _close(self, seen: Upload, status: str, file_id: str | None = None) -> bool:
        if not self._move(seen, status=status, file_id=file_id):
            return False
        self.files.content.delete_tree(f"{seen.project_id}/uploads/{seen.id}")
        with self.database.write() as connection:
            connection.execute(delete(upload_parts).where(upload_parts.c.upload_id == seen.id))
        return True

    def _move(self, seen: Upload, **values: Any) -> bool:
        """Compare-and-set: change an upload that is unchanged since it was read. `expires_at` identifies a claim."""
        unchanged = (uploads.c.status == seen.status) & (uploads.c.expires_at == seen.expires_at)
        with self.database.write() as connection:
            statement = update(uploads).where(uploads.c.id == seen.id, unchanged).values(**values)
            return bool(connection.execute(statement).rowcount)


def _refusal(upload: Upload) -> ConflictError:
    if upload.status == "completing":
        return ConflictError(f"Upload {upload.id} is being completed; ask again for its file.", "upload_not_pending")
    return ConflictError(f"Upload {upload.id} is {upload.status}.", "upload_not_pending")


def _key(upload: Upload, part_id: str) -> str:
    return f"{upload.project_id}/uploads/{upload.id}/{part_id}"
