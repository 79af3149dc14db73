"""Alembic migrations of the job records."""
