"""Structured logs: one JSON object per line with the current request and job, and without row text.

Only the fields in FIELDS are written. Exceptions are logged by type and location, because messages may quote rows.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType, TracebackType
from typing import Any, TextIO

from reft_ray.telemetry.tracing import current_ids

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
    """Formats a record as JSON: time, level, logger, message, trace, the fields in FIELDS, an exception's location."""

    def format(self, record: logging.LogRecord) -> str:
        """One line of JSON."""
        message = record.getMessage()
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": message if len(message) <= MESSAGE_LIMIT else message[:MESSAGE_LIMIT] + "...",
        }
        line |= current_ids()
        line |= _context.get()
        line |= {name: value for name in FIELDS if (value := getattr(record, name, None)) is not None}
        if record.exc_info and record.exc_info[0] is not None:
            kind, _, trace = record.exc_info
            frames = traceback.extract_tb(trace)[-_FRAMES:]
            line["exception"] = kind.__name__
            line["where"] = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
        return json.dumps(line, ensure_ascii=False, default=str)


def configure(level: str = "INFO", stream: TextIO | None = None, whole_process: bool = False) -> logging.Handler:
    """Log JSON lines to `stream` (default stderr), replacing an earlier JSON handler; returns the new handler.

    With `whole_process` the lines of other libraries, uncaught exceptions and warnings are JSON lines as well: their
    plain form would show an exception's message, which may quote a row.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter())
    loggers = [logging.getLogger("reft_ray")]
    loggers[0].propagate = False
    loggers[0].setLevel(level)
    if whole_process:
        loggers.append(logging.getLogger())
        warnings.showwarning = _log_warning
        sys.excepthook = _log_uncaught
        threading.excepthook = lambda uncaught: _log_uncaught(
            uncaught.exc_type, uncaught.exc_value, uncaught.exc_traceback
        )
    for logger in loggers:
        for old in list(logger.handlers):
            if isinstance(old.formatter, JsonFormatter):
                logger.removeHandler(old)
        logger.addHandler(handler)
    return handler


def _log_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    # Its message may quote a row as well.
    logging.getLogger("reft_ray").warning("%s at %s:%d", category.__name__, filename, lineno)


def _log_uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    # The formatter writes type and place only.
    logging.getLogger("reft_ray").critical("uncaught exception", exc_info=(kind, error or kind(), trace))
