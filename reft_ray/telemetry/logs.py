"""Structured logs: one JSON object per line with the current request and job, and without row text.

Only the fields in FIELDS are written. Exceptions are logged by type and location, because messages may quote rows.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, TextIO

FIELDS = (
    "request_id",
    "job_id",
    "screening_id",
    "project",
    "teacher",
    "stream",
    "route",
    "status",
    "error_type",
    "rows",
    "bytes",
    "tokens",
    "seconds",
)
MESSAGE_LIMIT = 1000
_FRAMES = 8
_NO_FIELDS: Mapping[str, str | int | float] = MappingProxyType({})
_context: ContextVar[Mapping[str, str | int | float]] = ContextVar("reft_log_fields", default=_NO_FIELDS)


@contextmanager
def log_context(**fields: str | int | float) -> Iterator[None]:
    """Add fields to all log records inside the block, including tasks and threads that inherit the context.

    Raises ValueError for a field that is not in FIELDS.
    """
    unknown = fields.keys() - set(FIELDS)
    if unknown:
        raise ValueError(f"unknown log fields {sorted(unknown)}: expected {list(FIELDS)}")
    token = _context.set({**_context.get(), **fields})
    try:
        yield
    finally:
        _context.reset(token)


class JsonFormatter(logging.Formatter):
    """Formats a record as JSON: time, level, logger, message, the fields in FIELDS, and an exception's location."""

    def format(self, record: logging.LogRecord) -> str:
        """One line of JSON."""
        message = record.getMessage()
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": message if len(message) <= MESSAGE_LIMIT else message[:MESSAGE_LIMIT] + "...",
        }
        line |= _context.get()
        line |= {name: value for name in FIELDS if (value := getattr(record, name, None)) is not None}
        if record.exc_info and record.exc_info[0] is not None:
            kind, _, trace = record.exc_info
            frames = traceback.extract_tb(trace)[-_FRAMES:]
            line["exception"] = kind.__name__
            line["where"] = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
        return json.dumps(line, ensure_ascii=False, default=str)


def configure(level: str = "INFO", stream: TextIO | None = None) -> logging.Handler:
    """Log JSON lines to `stream` (default stderr), replacing an earlier JSON handler; returns the new handler."""
    logger = logging.getLogger("reft_ray")
    for handler in list(logger.handlers):
        if isinstance(handler.formatter, JsonFormatter):
            logger.removeHandler(handler)
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter())
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    return handler
