"""Finetuned models of a project, and permissions of other projects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from reft_ray.jobs import ids
from reft_ray.jobs.audit import AuditLog
from reft_ray.jobs.database import Database
from reft_ray.jobs.errors import ConflictError, InvalidError, NotFoundError
from reft_ray.jobs.job import Job
from reft_ray.jobs.paging import Page, page
from reft_ray.jobs.tables import checkpoint_permissions, job_checkpoints, jobs, models, projects


@dataclass(frozen=True, slots=True)
class Student:
    """A model that passed the release gate. `uri` is its adapter directory."""

    id: str
    project_id: str
    organization_id: str
    job_id: str
    base_model: str
    uri: str
    created_at: float


@dataclass(frozen=True, slots=True)
class Permission:
    """Permits another project to use a checkpoint."""

    id: str
    checkpoint: str
    project_id: str
    created_at: float


_COLUMNS = [models.c[field.name] for field in fields(Student)]
_PERMISSION = [checkpoint_permissions.c[field.name] for field in fields(Permission)]


class ModelStore:
    """Register, find and delete students."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.audit = AuditLog(database)

    def register_in(self, connection: Connection, job: Job, uri: str) -> None:
        """Register a job's student, in the transaction in which the job succeeds."""
        connection.execute(
            insert(models).values(
                id=job.model_name,
                project_id=job.project_id,
                organization_id=job.organization_id,
                job_id=job.id,
                base_model=job.spec.model,
                uri=uri,
                created_at=self.database.now(),
            )
        )

    def list(self, project_id: str | None) -> Sequence[Student]:
        """A project's students, or those of all projects, newest first."""
        query = select(*_COLUMNS).where(models.c.deleted_at.is_(None))
        if project_id is not None:
            query = query.where(models.c.project_id == project_id)
        with self.database.read() as connection:
            return [
                Student(*row) for row in connection.execute(query.order_by(models.c.created_at.desc(), models.c.id))
            ]

    def get(self, model_id: str, project_id: str | None) -> Student:
        """Get a student of this project or one shared with it, or with None any student. Raises NotFoundError."""
        query = select(*_COLUMNS).where(models.c.id == model_id, models.c.deleted_at.is_(None))
        with self.database.read() as connection:
            row = connection.execute(query).first()
            if row is None:
                raise NotFoundError("model", model_id)
            student = Student(*row)
            visible = project_id in (None, student.project_id)
            if not visible and not self._shared(connection, model_id, str(project_id)):
                raise NotFoundError("model", model_id)
        return student

    def checkpoint_uri(self, name: str, project_id: str) -> tuple[Student, str]:
        """Look up a checkpoint by its name `...:ckpt-step-N`: its student and its URI. Raises NotFoundError."""
        model_id, _, step = name.rpartition(":ckpt-step-")
        if not step.isdecimal():
            raise NotFoundError("model", name)
        with self.database.read() as connection:
            row = connection.execute(
                select(*_COLUMNS).where(models.c.id == model_id, models.c.deleted_at.is_(None))
            ).first()
            if row is None or not (row.project_id == project_id or self._shared(connection, name, project_id)):
                raise NotFoundError("model", name)
            uri = connection.execute(
                select(job_checkpoints.c.uri).where(
                    job_checkpoints.c.job_id == row.job_id, job_checkpoints.c.step_number == int(step)
                )
            ).scalar()
        if uri is None:
            raise NotFoundError("model", name)
        return Student(*row), uri

    def delete(self, model_id: str, project_id: str, actor: Mapping[str, Any] | None = None) -> Student:
        """Delete a student of this project; the sweep removes its files. With an `actor`, it is in the audit log."""
        student = self.get(model_id, project_id)
        mine = (models.c.id == model_id) & (models.c.project_id == project_id) & models.c.deleted_at.is_(None)
        with self.database.write() as connection:
            if not connection.execute(update(models).where(mine).values(deleted_at=self.database.now())).rowcount:
                raise NotFoundError("model", model_id)
            if actor is not None:
                self.audit.append_in(connection, "model.deleted", actor, project_id, {"id": model_id})
        return student

    def deleted(self) -> Sequence[Student]:
        """Deleted students whose files may still exist."""
        with self.database.read() as connection:
            return [
                Student(*row) for row in connection.execute(select(*_COLUMNS).where(models.c.deleted_at.is_not(None)))
            ]

    def forget(self, model_id: str) -> None:
        """Remove a deleted student's record, once its files are removed."""
        with self.database.write() as connection:
            connection.execute(delete(checkpoint_permissions).where(checkpoint_permissions.c.checkpoint == model_id))
            connection.execute(delete(models).where(models.c.id == model_id, models.c.deleted_at.is_not(None)))

    def share(
        self, name: str, project_id: str, with_projects: Sequence[str], actor: Mapping[str, Any] | None = None
    ) -> Sequence[Permission]:
        """Permit other projects of the organisation to use a checkpoint or a model."""
        now = self.database.now()
        with self.database.write() as connection:
            self._own(connection, name, project_id)
            organization = select(projects.c.organization_id).where(projects.c.id == project_id)
            siblings = set(
                connection.execute(
                    select(projects.c.id).where(projects.c.organization_id == organization.scalar_subquery())
                ).scalars()
            )
            made = []
            for other in dict.fromkeys(with_projects):
                if other not in siblings:
                    raise InvalidError(f"project_ids: {other} is not a project of this organization.", "project_ids")
                permission = Permission(ids.new_id(ids.PERMISSION), name, other, now)
                if self._shared(connection, name, other):
                    raise ConflictError(f"{name} is already shared with {other}.", "permission_exists")
                connection.execute(
                    insert(checkpoint_permissions).values(
                        {field.name: getattr(permission, field.name) for field in fields(Permission)}
                    )
                )
                made.append(permission)
                if actor is not None:
                    entry = {"id": permission.id}
                    self.audit.append_in(connection, "checkpoint.permission.created", actor, project_id, entry)
        return made

    def permissions(
        self, name: str, project_id: str, *, after: str | None = None, limit: int = 10, only: str | None = None
    ) -> Page[Permission]:
        """The permissions of a checkpoint."""
        query = select(*_PERMISSION).where(checkpoint_permissions.c.checkpoint == name)
        if only is not None:
            query = query.where(checkpoint_permissions.c.project_id == only)
        with self.database.read() as connection:
            self._own(connection, name, project_id)
            return page(
                connection,
                checkpoint_permissions,
                query,
                lambda row: Permission(*row),
                after=after,
                limit=limit,
            )

    def unshare(self, name: str, project_id: str, permission_id: str, actor: Mapping[str, Any] | None = None) -> None:
        """Revoke a permission."""
        mine = (checkpoint_permissions.c.id == permission_id) & (checkpoint_permissions.c.checkpoint == name)
        with self.database.write() as connection:
            self._own(connection, name, project_id)
            if connection.execute(delete(checkpoint_permissions).where(mine)).rowcount == 0:
                raise NotFoundError("checkpoint permission", permission_id)
            if actor is not None:
                entry = {"id": permission_id}
                self.audit.append_in(connection, "checkpoint.permission.deleted", actor, project_id, entry)

    def _own(self, connection: Connection, name: str, project_id: str) -> None:
        model_id = name.partition(":ckpt-step-")[0]
        owner = connection.execute(
            select(models.c.project_id)
            .join_from(models, jobs, models.c.job_id == jobs.c.id)
            .where(models.c.id == model_id, models.c.deleted_at.is_(None))
        ).scalar()
        if owner != project_id:
            raise NotFoundError("model", name)

    @staticmethod
    def _shared(connection: Connection, name: str, project_id: str) -> bool:
        query = select(checkpoint_permissions.c.id).where(
            checkpoint_permissions.c.checkpoint == name, checkpoint_permissions.c.project_id == project_id
        )
        return connection.execute(query).first() is not None
