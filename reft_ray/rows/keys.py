"""Whether JSON has a key twice in one dictionary: readers differ in which value they take."""

from __future__ import annotations

import re

import orjson

_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"(\s*:)?', re.DOTALL)


def repeats_key(raw: bytes, value: object) -> bool:
    """Whether JSON (`raw`, parsed to `value`) has a key twice in one dictionary."""
    try:
        written = orjson.dumps(value)
    except orjson.JSONEncodeError:  # nested deeper than can be written
        return _keys_written(raw) != _keys_parsed(value)
    if b"\\" in raw and b"\\u0022" in raw:
        return _keys_written(raw) != _keys_parsed(value)
    # Faster: a lost entry also lost its quotes.
    return raw.count(b'"') != written.count(b'"')


def _keys_written(raw: bytes) -> int:
    return sum(1 for string in _STRING.finditer(raw) if string[1])


def _keys_parsed(value: object) -> int:
    pending, count = [value], 0
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            count += len(value)
            pending += value.values()
        elif isinstance(value, list):
            pending += value
    return count
