"""Alembic's entry point; it runs in the transaction of `Database.migrate`."""

from __future__ import annotations

from alembic import context

from reft_ray.jobs import training_tables  # noqa: F401  # its tables are in the metadata, too
from reft_ray.jobs.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True)
context.run_migrations()
