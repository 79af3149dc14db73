"""Alembic's entry point: runs on the connection, and in the transaction, that `Database.migrate` hands over."""

from __future__ import annotations

from alembic import context

from reft_ray.jobs.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True)
context.run_migrations()
