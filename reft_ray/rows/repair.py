"""Repairs of a JSONL line that lose nothing of its text."""

from __future__ import annotations

import ast
import json
import math
import re

import orjson

_STRING_OR_COMMA = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|,(?=\s*[}\]])', re.DOTALL)
_PYTHON_BYTES = 1 << 20
"""Python literals up to this size are read: its parser takes much memory per byte."""


def repaired(raw: bytes) -> tuple[bytes, str] | None:
    """A line as valid JSON and the name of its repair; an empty name where it is valid, None where nothing helps.

    Numbers that JSON has none of (NaN, Infinity) become null.
    """
    try:
        orjson.loads(raw)
    except orjson.JSONDecodeError:
        pass
    else:
        return raw, ""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return None
    commas = _STRING_OR_COMMA.sub(lambda match: match[0] if match[0] != "," else "", text)
    for name, candidate in (("numbers", text), ("commas", commas)):
        try:
            return _written(json.loads(candidate, strict=False, object_pairs_hook=_entries)), name
        except (ValueError, RecursionError, orjson.JSONEncodeError):
            continue
    if len(raw) > _PYTHON_BYTES:
        return None
    try:
        return _written(ast.literal_eval(text.strip())), "python"
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return None


def _entries(items: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(items)
    if len(found) != len(items):
        raise ValueError("a key twice")
    return found


def _written(value: object) -> bytes:
    return orjson.dumps(_finite(value))


def _finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
